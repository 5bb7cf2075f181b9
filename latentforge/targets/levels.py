"""Log-probabilities as levels of a ladder: what is rounded, and by how much at most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from latentforge.errors import RefusedError
from latentforge.targets.integers import LARGEST

TAIL_STEP = 1.0 / 512.0
_FIRST_STEP = 1.0 / 1024.0
_TABLE = 4096
_NO_MASS = 0

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GradedLevels:
    """Levels below a position's first entry, in nats: ``finest`` · exp(-x / 2) apart where a logprob lies x <= 0 below
    the first, never more than ``coarsest``. The first entry itself is rounded to 1/1024 nat.

    A KD gradient weighs a token's error by its probability to the power 1/T, so what is said about a likely token has
    to be finer. With steps that grow with the root of 1/p each token has about the same share of the error at T = 2,
    and the likely ones have the larger share at T = 1. Relative to the first entry, so that the rows of an unsure
    teacher, where no token has much mass, are not rounded more than those of a sure one.
    """

    finest: float
    coarsest: float

    def __post_init__(self) -> None:
        if not 0 < self.finest <= self.coarsest < 1:
            raise RefusedError(f"steps of {self.finest} to {self.coarsest} nats: 0 < finest <= coarsest < 1 is needed")

    @property
    def first_step(self) -> float:
        """The step of a position's first entry, in nats."""
        return _FIRST_STEP

    @property
    def _turn(self) -> tuple[float, float]:
        """How far below the first, and at which level, the steps become the coarsest."""
        ratio = self.finest / self.coarsest
        return 2.0 * math.log(ratio), (2.0 / self.finest) * (1.0 - ratio)

    def quantise(self, logprobs: npt.NDArray[Any], there: npt.NDArray[np.bool_]) -> tuple[Numbers, Numbers]:
        """``(firsts [P], levels [P, k])`` of ``logprobs [P, k]``, a level is nothing where not ``there``."""
        x = np.where(there, logprobs, 0.0).astype(np.float64)
        firsts = np.rint(np.maximum(-x[:, 0], 0.0) / _FIRST_STEP)
        below = np.minimum(x - self._base(firsts)[:, None], 0.0)
        turn, level = self._turn
        graded = (2.0 / self.finest) * (1.0 - np.exp(np.maximum(below, turn) / 2.0))
        levels = np.rint(np.where(below >= turn, graded, level + (turn - below) / self.coarsest))
        levels[:, 0] = 0
        if x.size and max(firsts.max(), levels.max()) > LARGEST:
            raise RefusedError(f"logprob {x.min():.3g} is not what a softmax gives", next="store minus infinity")
        return firsts.astype(np.int64), levels.astype(np.int64)

    def logprobs_of(self, firsts: npt.NDArray[Any], levels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """float32 ``[P, k]`` of ``firsts [P]`` and ``levels [P, k]``."""
        a, b = self.beyond
        known = len(self.table)
        far = (a - levels.astype(np.float64) * b).astype(np.float32)
        below = np.where(levels < known, self.table[np.minimum(levels, known - 1)], far)
        return self._base(firsts)[:, None] + below

    def error(self, logprobs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """How far, in nats, stored logprobs may lie from those given (``[…, k]``, a position's first entry first)."""
        x = np.asarray(logprobs, np.float64)
        step = np.minimum(self.finest * np.exp((x[..., :1] - x) / 2.0), self.coarsest)
        # The first may be rounded below an entry that is nearly as likely, which then is rounded as it is.
        step = np.where(x[..., :1] - x <= 0.5 * _FIRST_STEP, np.maximum(step, _FIRST_STEP), step)
        step[..., :1] = _FIRST_STEP
        # Half a step, and what it grows by over that half.
        return np.asarray(0.5 * step / (1.0 - step) + 1e-6)

    def _base(self, firsts: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        return (-(firsts.astype(np.float64) * _FIRST_STEP)).astype(np.float32)

    @cached_property
    def table(self) -> npt.NDArray[np.float32]:
        """How far below the first entry the first levels lie, to be looked up."""
        _, level = self._turn
        u = np.arange(max(_TABLE, math.ceil(level) + 1), dtype=np.float64)
        graded = 2.0 * np.log(1.0 - np.minimum(u, level) * (self.finest / 2.0))
        a, b = self.beyond
        return np.where(u <= level, graded, a - u * b).astype(np.float32)

    @property
    def beyond(self) -> tuple[float, float]:
        """``(a, b)``: after the table a level u stands for a - u · b."""
        turn, level = self._turn
        return turn + level * self.coarsest, self.coarsest


_OFF_A_COUNT = 0.01
"""By how much a float32 logarithm may miss a count: of 65 536 draws it is off by up to 0.002."""


@dataclass(frozen=True)
class CountLevels:
    """How often a token was drawn of ``draws``: level u stands for log((draws - u) / draws), exactly."""

    draws: int

    def __post_init__(self) -> None:
        if not 1 <= self.draws <= 65_536:
            raise RefusedError(f"draws = {self.draws} is not between 1 and 65536")

    @property
    def first_step(self) -> float:
        """0: levels do not stand below a first one."""
        return 0.0

    def quantise(self, logprobs: npt.NDArray[Any], there: npt.NDArray[np.bool_]) -> tuple[Numbers, Numbers]:
        """``(firsts [P], levels [P, k])``: ``draws`` less the count; refused where a logprob is not that of a count."""
        counts = np.where(there, np.exp(logprobs.astype(np.float64)) * self.draws, 1.0)
        whole = np.rint(counts)
        if counts.size and (np.abs(counts - whole).max() > _OFF_A_COUNT or whole.min() < 1 or whole.max() > self.draws):
            worst = float(counts.reshape(-1)[np.abs(counts - whole).argmax()])
            raise RefusedError(f"a row says that a token was drawn {worst:.4g} times of {self.draws}")
        levels = (self.draws - whole).astype(np.int64)
        return np.where(there[:, 0], levels[:, 0], 0), levels

    def logprobs_of(self, firsts: npt.NDArray[Any], levels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """float32 ``[P, k]`` of ``levels [P, k]``, which are counted from certainty."""
        if levels.size and int(levels.max()) >= self.draws:
            raise ValueError(f"level {int(levels.max())} of {self.draws} draws")
        return self.table[levels]

    def error(self, logprobs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Rounding of float32 alone."""
        return np.full(np.shape(logprobs), 1e-6)

    @cached_property
    def table(self) -> npt.NDArray[np.float32]:
        """Every level's log-probability."""
        return np.log((self.draws - np.arange(self.draws, dtype=np.float64)) / self.draws).astype(np.float32)

    @property
    def beyond(self) -> tuple[float, float]:
        """There is no level after the table."""
        return math.nan, math.nan


Levels = GradedLevels | CountLevels


def ceiling(temperature: float) -> float:
    """No tail at this temperature is above it: masses are at most 1, and 2^23 of them at most e^16."""
    return 0.0 if temperature <= 1.0 else 16.0


def quantise_tail(tail: npt.NDArray[Any], temperature: float) -> Numbers:
    """0 for minus infinity, else 1 + the distance from the ceiling in steps of 1/512 nat."""
    x = np.where(np.isneginf(tail), 0.0, tail.astype(np.float64))
    steps = np.rint((ceiling(temperature) - x) / TAIL_STEP)
    if steps.size and (steps.min() < 0 or steps.max() >= LARGEST):
        raise RefusedError(
            f"tail of {x.min():.3g} to {x.max():.3g} nats at T = {temperature:g} is not a mass's logarithm"
        )
    return np.where(np.isneginf(tail), _NO_MASS, 1 + steps).astype(np.int64)


def tail_of(levels: npt.NDArray[Any], temperature: float) -> npt.NDArray[np.float32]:
    """float32 tails of :func:`quantise_tail`."""
    value = ceiling(temperature) - (levels.astype(np.float64) - 1.0) * TAIL_STEP
    return np.where(levels == _NO_MASS, -np.inf, value).astype(np.float32)
