"""A teacher's targets for all rows of a data run, written to a store and checked against the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from latentforge.data.shards import ShardSet
from latentforge.errors import FailedError, RefusedError
from latentforge.targets.store import Coverage, TargetStore
from latentforge.teachers.crossed import CrossedShards
from latentforge.teachers.hf import HFTeacher
from latentforge.teachers.protocol import Scorer, behind
from latentforge.teachers.sampled import SampledTeacher

# Store and fresh forward differ by the shape of the matrix products; a shifted row differs by whole nats.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25}
DRAWS = {"float32": 0.1, "bfloat16": 0.3}
"""The mean share of a row's draws that may come out differently when the teacher computes them in other shapes."""
ELSEWHERE = 0.5
"""Nats by which an entry of a served teacher may differ when it is asked again: it does not say how it computes."""
_ABOVE_ROUNDING = -8.0
_COMMIT_ROWS = 256
_ASK_ROWS = 4096

Data = ShardSet | CrossedShards
Rows = npt.NDArray[np.int64] | list[npt.NDArray[np.int64]]
"""Sequences: one array of those of one length, or one each (a teacher of another tokenizer)."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Agreement:
    """How far stored rows lie from the teacher asked again, beyond the rounding of the store's format.

    ``worst`` in ``unit`` over ``positions`` positions; of drawn rows it is a share of their draws, 0 to 1.
    """

    worst: float
    positions: int
    unit: Literal["nats", "draws"] = "nats"


def sequences(data: Data, *, batch_size: int) -> Iterator[Rows]:
    """All training rows, then all held-out rows, in order, int64 ``[b, L]`` (or ``[n]`` each)."""
    for shard in (data.train, data.heldout):
        for begin, end in pairwise([*range(0, len(shard), batch_size), len(shard)]):
            yield shard.rows(np.arange(begin, end))


def score_all(
    teacher: Scorer,
    data: Data,
    store: TargetStore,
    *,
    batch_size: int,
    progress: Progress = lambda done, total: None,
) -> int:
    """Score what the store lacks; returns how many rows are new. Stopped anywhere, it resumes.

    What is answered is stored before anything else happens to it: a document at a time, or, where the teacher computes
    in this process, ``batch_size`` at a time. So whoever kills this loses what was being computed, and nothing stored
    is ever asked for again. TeacherFailure leaves everything stored that was answered.
    """
    total, done, new = len(data.train) + len(data.heldout), 0, 0
    first = b""
    # Also one behind a cache, which lets no logits through.
    computes_here = any("logits" in one.capabilities for one in behind(teacher))
    for block in sequences(data, batch_size=max(batch_size, _COMMIT_ROWS) if computes_here else _ASK_ROWS):
        keys = [store.key(tokens) for tokens in block]
        present = store.present(keys)
        # One of equal sequences is enough.
        wanted = list({key: tokens for key, tokens in zip(keys, block, strict=True) if key not in present}.values())
        done += len(block) - len(wanted)
        progress(done, total)
        for at in range(0, len(wanted), batch_size if computes_here else max(1, len(wanted))):
            batch = wanted[at : at + batch_size] if computes_here else wanted
            scored = teacher.score(batch, k=store.k, temperatures=store.temperatures)
            for rows in [list(scored)] if computes_here else ([one] for one in scored):
                new += store.put_many((batch[number], targets) for number, targets in rows)
                done += len(rows)
                progress(done, total)
        first = first or keys[0]
        _check_room(store, first, done, total)
    return new


def _check_room(store: TargetStore, first: bytes, done: int, total: int) -> None:
    """Stop before the teacher is paid for rows that push out others: a score run has to keep them all."""
    limit = store.policy.max_bytes
    if limit is None:
        return
    stats = store.stats()
    need = int(stats["packed_bytes"] / max(1, stats["rows"]) * total)
    pushed_out = not stats["too_old"] and first not in store.present([first])
    if need > limit or pushed_out:
        raise FailedError(
            f"score.max_bytes = {limit} has no room for the targets of {total} sequences: after {done} of them, all "
            f"would take about {need} bytes and the file's own",
            next=f"set score.max_bytes = {need + need // 4} or more, or leave it out",
        )


def coverage(store: TargetStore, data: Data) -> Coverage:
    """How many of the data's sequences have targets in the store."""
    return store.coverage(store.key(tokens) for block in sequences(data, batch_size=1024) for tokens in block)


def check_agreement(teacher: Scorer, store: TargetStore, data: Data, *, sample: int = 8) -> Agreement:
    """Ask the teacher again for single positions of a sample and compare; FailedError where the store differs.

    Each question is a *prefix* of a sequence and the answer its last row, which cannot be off by one: a store whose
    rows were shifted against the tokens disagrees. Compared are all stored ids of the row, not the top one alone; of a
    teacher elsewhere, which is paid for each question, a quarter of the sample, without whole sequences, and entries
    above its rounding only. Drawn rows are drawn again.
    """
    if isinstance(teacher, SampledTeacher):
        return _check_drawn(teacher, store, data, sample)
    worst, positions = 0.0, 0
    length = data.shortest if isinstance(data, CrossedShards) else data.sequence_length
    places = [0, length // 2 - 1, length - 2]
    here = isinstance(teacher, HFTeacher)
    if not here:
        sample, places = max(2, sample // 4), places[:2]
    tolerance = TOLERANCE[teacher.dtype] if isinstance(teacher, HFTeacher) else ELSEWHERE
    for tokens in _sampled(data, sample):
        stored = store.get(tokens)
        for position in sorted(set(places)):
            # targets() wants a token after the last predicted one and does not look at it.
            asked = tokens[: position + 2]
            ids, logprobs = stored.ids[position], stored.logprobs[position]
            if isinstance(teacher, HFTeacher):
                logits = teacher.logits(torch.from_numpy(asked).unsqueeze(0))
                fresh = torch.log_softmax(logits[-1].double(), dim=-1).cpu().numpy()
                known = ids >= 0
                # What the format rounds (see latentforge.targets.levels) is no difference.
                apart = np.abs(fresh[ids[known]] - logprobs[known]) - store.levels.error(logprobs[known])
                differs = float(apart.max(initial=0.0))
            else:
                _, again = next(teacher.score([asked], k=store.k, temperatures=store.temperatures))
                differs = _apart(ids, logprobs, again.ids[-1], again.logprobs[-1])
            worst = float(np.maximum(worst, differs))  # not a number stays one
            positions += 1
    if not worst <= tolerance:
        raise FailedError(
            f"stored targets differ from the teacher's own by {worst:.3g} nats at {positions} positions asked again "
            f"(at most {tolerance:g} is rounding)",
            next="the store is misaligned or damaged: score again from the start",
        )
    return Agreement(worst, positions)


def _check_drawn(teacher: SampledTeacher, store: TargetStore, data: Data, sample: int) -> Agreement:
    length = data.shortest if isinstance(data, CrossedShards) else data.sequence_length
    places = sorted({0, length // 2 - 1, length - 2})
    asked = [
        teacher.differs(tokens, store.get(tokens), position) for tokens in _sampled(data, sample) for position in places
    ]
    tolerance = DRAWS[str(getattr(teacher.teacher, "dtype", "float32"))]
    mean = sum(asked) / len(asked)
    if not mean <= tolerance:
        raise FailedError(
            f"of the stored draws {mean:.0%} are not the teacher's own at {len(asked)} positions drawn again "
            f"(at most {tolerance:.0%} is rounding)",
            next="the store is misaligned or damaged: score again from the start",
        )
    return Agreement(max(asked), len(asked), "draws")


def _apart(
    ids: npt.NDArray[np.int32],
    logprobs: npt.NDArray[np.float32],
    other_ids: npt.NDArray[np.int32],
    other_logprobs: npt.NDArray[np.float32],
) -> float:
    """How far two rows of one position lie from each other, in nats, over the entries of the first above rounding."""
    other = {int(n): float(v) for n, v in zip(other_ids, other_logprobs, strict=True) if n >= 0}
    floor = min(other.values())
    apart = [
        abs(other[int(n)] - float(v)) if int(n) in other else max(0.0, float(v) - floor)
        for n, v in zip(ids, logprobs, strict=True)
        if n >= 0 and v > _ABOVE_ROUNDING
    ]
    return max(apart, default=0.0)


def _sampled(data: Data, sample: int) -> Iterator[npt.NDArray[np.int64]]:
    """About ``sample`` rows, spread evenly over the training and over the held-out rows."""
    for shard in (data.train, data.heldout):
        chosen = np.linspace(0, len(shard) - 1, num=min(max(1, sample // 2), len(shard)))
        yield from shard.rows(np.unique(chosen.astype(np.int64)))


def check_scorable(teacher: Scorer, data: Data, *, k: int, temperatures: tuple[float, ...] = (1.0,)) -> None:
    """Refuse, before the first document, what could not be scored; a server is asked what it can do."""
    if k > teacher.vocab_size:
        raise RefusedError(
            f"score.k = {k} is larger than the vocabulary ({teacher.vocab_size} tokens)",
            next=f"set score.k = {teacher.vocab_size} or less",
        )
    teacher.limits.check(k=k, tokens=data.sequence_length, temperatures=temperatures)
