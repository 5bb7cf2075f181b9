"""A teacher's targets for all rows of a data run, written to a store and checked against the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from latentforge.data.shards import ShardSet
from latentforge.errors import FailedError, RefusedError
from latentforge.targets.row import SequenceTargets
from latentforge.targets.store import Coverage, TargetStore
from latentforge.targets.topk import sequence_rows
from latentforge.teachers.hf import HFTeacher

# Store and fresh forward differ by the shape of the matrix products; a shifted row differs by whole nats.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25}
_COMMIT_ROWS = 256

Rows = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Agreement:
    """How far stored rows lie from the teacher asked again: ``worst`` in nats over ``positions`` positions."""

    worst: float
    positions: int


def sequences(data: ShardSet, *, batch_size: int) -> Iterator[Rows]:
    """All training rows, then all held-out rows, in order, int64 ``[b, L]``."""
    for shard in (data.train, data.heldout):
        for begin, end in pairwise([*range(0, len(shard), batch_size), len(shard)]):
            yield shard.rows(np.arange(begin, end))


def score_all(
    teacher: HFTeacher,
    data: ShardSet,
    store: TargetStore,
    *,
    batch_size: int,
    progress: Progress = lambda done, total: None,
) -> int:
    """Score what the store lacks, in the data's order; returns how many rows are new. Stopped anywhere, it resumes."""
    total, done, new = len(data.train) + len(data.heldout), 0, 0
    for block in sequences(data, batch_size=max(batch_size, _COMMIT_ROWS)):
        keys = [store.key(tokens) for tokens in block]
        present = store.present(keys)
        # One of equal sequences is enough.
        wanted = list({key: tokens for key, tokens in zip(keys, block, strict=True) if key not in present}.values())
        rows: list[tuple[Rows, SequenceTargets]] = []
        for at in range(0, len(wanted), batch_size):
            batch = np.stack(wanted[at : at + batch_size])
            ids, logprobs, tails = teacher.topk(torch.from_numpy(batch), k=store.k, temperatures=store.temperatures)
            rows += zip(batch, sequence_rows(ids, logprobs, tails, sequences=len(batch)), strict=True)
        new += store.put_many(rows)
        done += len(block)
        progress(done, total)
    return new


def coverage(store: TargetStore, data: ShardSet) -> Coverage:
    """How many of the data's sequences have targets in the store."""
    return store.coverage(store.key(tokens) for block in sequences(data, batch_size=1024) for tokens in block)


def check_agreement(teacher: HFTeacher, store: TargetStore, data: ShardSet, *, sample: int = 8) -> Agreement:
    """Ask the teacher again for single positions of a sample and compare; FailedError where the store differs.

    Each question is a *prefix* of a sequence and the answer its last row, which cannot be off by one: a store whose
    rows were shifted against the tokens disagrees. Compared are all stored ids of the row, not the top one alone.
    """
    worst, positions = 0.0, 0
    length = data.sequence_length
    for tokens in _sampled(data, sample):
        stored = store.get(tokens)
        for position in sorted({0, length // 2 - 1, length - 2}):
            # targets() wants a token after the last predicted one and does not look at it.
            asked = torch.from_numpy(tokens[: position + 2]).unsqueeze(0)
            fresh = torch.log_softmax(teacher.logits(asked)[-1].double(), dim=-1).cpu().numpy()
            worst = max(worst, float(np.abs(fresh[stored.ids[position]] - stored.logprobs[position]).max()))
            positions += 1
    tolerance = TOLERANCE[teacher.dtype]
    if not worst <= tolerance:
        raise FailedError(
            f"stored targets differ from the teacher's own by {worst:.3g} nats at {positions} positions asked again "
            f"(at most {tolerance:g} is rounding)",
            next="the store is misaligned or damaged: score again from the start",
        )
    return Agreement(worst, positions)


def _sampled(data: ShardSet, sample: int) -> Iterator[npt.NDArray[np.int64]]:
    """About ``sample`` rows, spread evenly over the training and over the held-out rows."""
    for shard in (data.train, data.heldout):
        chosen = np.linspace(0, len(shard) - 1, num=min(max(1, sample // 2), len(shard)))
        yield from shard.rows(np.unique(chosen.astype(np.int64)))


def check_scorable(teacher: HFTeacher, data: ShardSet, *, k: int) -> None:
    """Refuse, before the first forward pass, what could not be scored."""
    if k > teacher.vocab_size:
        raise RefusedError(
            f"score.k = {k} is larger than the vocabulary ({teacher.vocab_size} tokens)",
            next=f"set score.k = {teacher.vocab_size} or less",
        )
    limit = teacher.folder.max_positions
    if limit is not None and data.sequence_length > limit:
        raise RefusedError(
            f"data.sequence_length = {data.sequence_length} is longer than the teacher's {limit} positions",
            next=f"set data.sequence_length = {limit} or less",
        )
