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
_TABLE = 4096
_NO_MASS = 0

Levels_ = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GradedLevels:
    """Steps in nats that grow as a token gets rarer: ``finest`` · exp(-logprob / 2), never above ``coarsest``.

    A KD gradient weighs a token's error by its probability to the power 1/T, so what is said about a likely token has
    to be finer. With steps that grow with the root of 1/p, each token's share of the error is about the same at T = 2,
    and the likely ones have the larger share at T = 1.
    """

    finest: float
    coarsest: float

    def __post_init__(self) -> None:
        if not 0 < self.finest <= self.coarsest < 1:
            raise RefusedError(f"steps of {self.finest} to {self.coarsest} nats: 0 < finest <= coarsest < 1 is needed")

    @property
    def _turn(self) -> tuple[float, float]:
        """The logprob, and the level, from which the step is the coarsest."""
        ratio = self.finest / self.coarsest
        return 2.0 * math.log(ratio), (2.0 / self.finest) * (1.0 - ratio)

    def quantise(self, logprobs: npt.NDArray[Any]) -> Levels_:
        """The nearest level, 0 for certainty and rising as the logprob falls; order is kept."""
        x = np.minimum(logprobs.astype(np.float64), 0.0)
        turn, level = self._turn
        graded = (2.0 / self.finest) * (1.0 - np.exp(np.maximum(x, turn) / 2.0))
        levels = np.rint(np.where(x >= turn, graded, level + (turn - x) / self.coarsest))
        if levels.size and levels.max() > LARGEST:
            raise RefusedError(f"logprob {logprobs.min():.3g} is not what a softmax gives", next="store minus infinity")
        return np.asarray(levels, np.int64)

    def logprobs_of(self, levels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """float32 log-probabilities of levels."""
        turn, level = self._turn
        u = levels.astype(np.float64)
        graded = 2.0 * np.log(1.0 - np.minimum(u, level) * (self.finest / 2.0))
        return np.where(u <= level, graded, turn - (u - level) * self.coarsest).astype(np.float32)

    def error(self, logprobs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """How far, in nats, a stored logprob may lie from what was given: half the step there, and its curvature."""
        step = np.minimum(self.finest * np.exp(-np.asarray(logprobs, np.float64) / 2.0), self.coarsest)
        return np.asarray(0.5 * step / (1.0 - step / 2.0) + 1e-6)

    @cached_property
    def table(self) -> npt.NDArray[np.float32]:
        """``logprobs_of`` the first levels, for readers that look them up."""
        return np.ascontiguousarray(self.logprobs_of(np.arange(_TABLE)))

    @property
    def beyond(self) -> tuple[float, float]:
        """``(a, b)``: after the table a level u stands for a - u · b."""
        turn, level = self._turn
        return turn + level * self.coarsest, self.coarsest


@dataclass(frozen=True)
class CountLevels:
    """How often a token was drawn of ``draws``: level u stands for log((draws - u) / draws), exactly."""

    draws: int

    def __post_init__(self) -> None:
        if not 1 <= self.draws <= 65_536:
            raise RefusedError(f"draws = {self.draws} is not between 1 and 65536")

    def quantise(self, logprobs: npt.NDArray[Any]) -> Levels_:
        """``draws`` less the count; refused where a logprob is not that of a count."""
        counts = np.exp(logprobs.astype(np.float64)) * self.draws
        whole = np.rint(counts)
        if counts.size and (np.abs(counts - whole).max() > 1e-3 or whole.min() < 1 or whole.max() > self.draws):
            worst = float(counts[np.abs(counts - whole).argmax()])
            raise RefusedError(f"a row says that a token was drawn {worst:.4g} times of {self.draws}")
        return np.asarray(self.draws - whole, np.int64)

    def logprobs_of(self, levels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """float32 log-probabilities of levels."""
        return np.log((self.draws - levels.astype(np.float64)) / self.draws).astype(np.float32)

    def error(self, logprobs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Rounding of float32 alone."""
        return np.full(np.shape(logprobs), 1e-6)

    @cached_property
    def table(self) -> npt.NDArray[np.float32]:
        """``logprobs_of`` every level."""
        return np.ascontiguousarray(self.logprobs_of(np.arange(self.draws)))

    @property
    def beyond(self) -> tuple[float, float]:
        """There is no level after the table."""
        return math.nan, math.nan


Levels = GradedLevels | CountLevels


def ceiling(temperature: float) -> float:
    """No tail at this temperature is above it: masses are at most 1, and 2^23 of them at most e^16."""
    return 0.0 if temperature <= 1.0 else 16.0


def quantise_tail(tail: npt.NDArray[Any], temperature: float) -> Levels_:
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
