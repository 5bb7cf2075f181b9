"""Whether what was drawn after a text is what the teacher says of it: asked another way, and compared.

A teacher in this process is asked for its logits of context and chunk as one text, and must draw the same tokens from
them. A server draws with a noise of its own: its draws must be as likely under its own rows as draws of these rows are,
and come twice as often. A store whose rows belong to neighbouring chunks fails both, as does a server that takes the
likeliest token, gives one draw R times, or begins after another token than it was sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from latentforge.contracts.finding import worse
from latentforge.errors import FailedError
from latentforge.kernels.noise import gumbel
from latentforge.targets.continued import Ids
from latentforge.targets.row import SequenceTargets
from latentforge.teachers.continuing import Contexts, Continuing
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.hf import HFTeacher
from latentforge.teachers.protocol import Tokens

TOLERANCE = {"float32": 4e-3, "bfloat16": 0.5, "float16": 0.1}
"""Nats by which a drawn token may lie below the best one when it is computed again, in other shapes."""
DEVIATIONS = 5.0
"""Standard deviations from what is expected of a served teacher's draws."""
_NO_ROWS = ("no-logprobs", "collapsed", "refused-request", "too-few", "shifted")
_K = 20
_DRAWS = 8
_SURPRISE = 4.0
"""Nats below a row's mean at which a token counts no further: one rare token of a sure teacher would decide all."""
_LEAST_VARIANCE = 4.0
"""Two or three rare tokens are no finding, however sure the teacher is."""
_NEXT = "the store is misaligned, or the teacher does not draw from its own distribution: continue again from the start"

Rows = Iterable[tuple[Tokens, dict[float, Ids]]]
"""Rows int64 [C * K], each with what was drawn after its chunks."""


@dataclass(frozen=True)
class DrawsAgreement:
    """How far what was drawn lies from the teacher asked another way: ``worst`` in ``unit`` over ``tokens`` of them."""

    worst: float
    tokens: int
    unit: Literal["nats", "deviations"]


def check_draws(teacher: Any, rows: Rows, asked: Continuing) -> DrawsAgreement | None:
    """Compare, at the first, a middle and the last context of each row; FailedError where it differs.

    None of a server that draws and does not score: there is nothing to compare with.
    """
    if isinstance(teacher, HFTeacher):
        found = _drawn_again(teacher, rows, asked)
        tolerance = TOLERANCE[teacher.dtype]
    elif not _scores(teacher):
        return None
    else:
        found = _as_likely(teacher, rows, asked)
        tolerance = DEVIATIONS
    if not found.worst <= tolerance:
        raise FailedError(
            f"what was drawn lies {found.worst:.3g} {found.unit} from what the teacher says when it is asked another "
            f"way ({found.tokens} tokens; at most {tolerance:g} is chance and rounding)",
            next=_NEXT,
        )
    return found


def _scores(teacher: Any) -> bool:
    """Whether the teacher gives rows of a text; a server is asked."""
    try:
        return "score" in teacher.capabilities and bool(teacher.limits)
    except TeacherFailure as failure:
        if failure.kind in _NO_ROWS:
            return False
        raise


def _places(row: Contexts) -> list[int]:
    """Which contexts of a row are compared."""
    return sorted({0, len(row.chunks) // 2, len(row.chunks) - 1}) if len(row.chunks) else []


def _drawn_again(teacher: HFTeacher, rows: Rows, asked: Continuing) -> DrawsAgreement:
    worst, tokens = 0.0, 0
    ids = torch.arange(teacher.vocab_size, device=teacher.model.device)
    for sequence, drawn in rows:
        row = Contexts.of(sequence, asked)
        for place in _places(row):
            chunk, end = int(row.chunks[place]), int(row.ends[place])
            for temperature in asked.temperatures:
                number = chunk % asked.count
                chosen = drawn[temperature][chunk, number]
                text = np.concatenate([row.text[:end], chosen])
                logits = teacher.logits(torch.from_numpy(text)[None])[end - 1 :, : teacher.vocab_size].float()
                key = torch.tensor(asked.key(sequence, temperature), device=ids.device)
                for at, token in enumerate(_until_end(chosen, asked.eos_id)):
                    position = int(asked.positions(np.array([chunk]), at)[number, 0])
                    noise = gumbel(key, torch.tensor(position, device=ids.device), ids)
                    heights = logits[at] + temperature * noise
                    worst = worse(worst, float(heights.max() - heights[token]))
                    tokens += 1
    return DrawsAgreement(worst, tokens, "nats")


def _as_likely(teacher: Any, rows: Rows, asked: Continuing) -> DrawsAgreement:
    k = min(_K, teacher.vocab_size, teacher.limits.max_k or _K)
    likely, twice, outside = _Sum(), _Sum(), _Sum()
    for sequence, drawn in rows:
        row = Contexts.of(sequence, asked)
        for place in _places(row):
            chunk, end = int(row.chunks[place]), int(row.ends[place])
            for temperature in asked.temperatures:
                chunks = [_until_end(one, asked.eos_id) for one in drawn[temperature][chunk]]
                texts = [np.concatenate([row.text[:end], one]) for one in chunks[:_DRAWS]]
                for number, scored in teacher.score(texts, k=k, temperatures=(1.0,)):
                    if number == 0:
                        _Row.of(scored, end - 1, temperature).add_pairs(twice, [int(one[0]) for one in chunks])
                    for at, token in enumerate(chunks[number]):
                        _Row.of(scored, end - 1 + at, temperature).add(likely, outside, int(token))
    worst = reduce(worse, (abs(likely.deviations), abs(twice.deviations), outside.deviations))
    return DrawsAgreement(worst, outside.count, "deviations")


def _until_end(chunk: npt.NDArray[np.int32], eos_id: int) -> npt.NDArray[np.int64]:
    """A drawn chunk up to its first EOS, it included."""
    ends = np.flatnonzero(chunk == eos_id)
    return np.asarray(chunk[: ends[0] + 1] if len(ends) else chunk, dtype=np.int64)


class _Sum:
    """A sum of numbers whose means and variances are known."""

    def __init__(self) -> None:
        self.found = self.mean = self.variance = 0.0
        self.count = 0

    def add(self, found: float, mean: float, variance: float) -> None:
        """One more."""
        self.found, self.mean, self.variance = self.found + found, self.mean + mean, self.variance + variance
        self.count += 1

    @property
    def deviations(self) -> float:
        """Standard deviations by which the sum is above its mean."""
        return (self.found - self.mean) / math.sqrt(self.variance + _LEAST_VARIANCE)


@dataclass(frozen=True)
class _Row:
    """One position at a temperature of at most 1: the ``shares`` of the ids that a row names among themselves, and what
    all others have at most. The tail of a row says that exactly at T = 1 alone, so shares are those of named ids."""

    ids: list[int]
    shares: npt.NDArray[np.float64]
    others: float

    @classmethod
    def of(cls, targets: SequenceTargets, at: int, temperature: float) -> _Row:
        there = targets.ids[at] >= 0
        logprobs = targets.logprobs[at][there].astype(np.float64)
        shares = np.exp((logprobs - logprobs[0]) / temperature)
        tail = float(targets.tails[1.0][at])
        # None of the others is likelier than the last that is named.
        most = math.exp(tail + float(logprobs[-1] - logprobs[0]) / temperature - float(logprobs[-1]))
        others = min(math.exp(tail), most / (most + float(shares.sum())))
        return cls(targets.ids[at][there].tolist(), shares / shares.sum(), others)

    def add(self, likely: _Sum, outside: _Sum, token: int) -> None:
        """Add the log of what was drawn, and whether it is none that is named."""
        outside.add(float(token not in self.ids), self.others, self.others * (1 - self.others))
        if token not in self.ids:
            return
        logs = np.log(np.maximum(self.shares, 1e-300))
        logs = np.maximum(logs, float(self.shares @ logs) - _SURPRISE)
        mean = float(self.shares @ logs)
        likely.add(float(logs[self.ids.index(token)]), mean, float(self.shares @ (logs - mean) ** 2))

    def add_pairs(self, twice: _Sum, drawn: list[int]) -> None:
        """Add how many pairs of the named draws are equal, a draw being in so many pairs as there are others."""
        counts = np.array([drawn.count(number) for number in self.ids], dtype=np.float64)
        named = int(counts.sum())
        if named < 2:
            return
        pairs, triples, each = math.comb(named, 2), math.comb(named, 3), named - 1
        two, three = float((self.shares**2).sum()), float((self.shares**3).sum())
        variance = pairs * two * (1 - two) + 6 * triples * (three - two**2)
        found = float((counts * (counts - 1)).sum()) / 2
        twice.add(found / each, pairs * two / each, max(variance, 0.0) / each**2)
