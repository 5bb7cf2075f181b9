"""Axes: where ticks stand, whether a scale is logarithmic, and series thinned to what a picture can show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]
_LARGEST = 1e300
_SHOWN = 480
"""Points of a line that a picture shows: more lie on one another."""


@dataclass(frozen=True)
class Axis:
    """A scale from ``low`` to ``high`` (in the numbers' own units) with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Where a value stands, 0 at ``low`` and 1 at ``high``."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return (value - low) / (high - low)


def drawable(value: float) -> bool:
    """Whether a number has a place in a picture: it is one, and far enough from where doubles end."""
    return abs(value) <= _LARGEST


def axis_of(values: Sequence[float], *, zero: bool = False, logarithmic: bool | None = None, count: int = 5) -> Axis:
    """The axis that holds all finite ``values``.

    ``logarithmic`` None: where all are positive and the greatest is more than 60 times the least. ``zero`` has a linear
    axis begin at 0.
    """
    finite = [value for value in values if drawable(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if logarithmic is None:
        logarithmic = not zero and low > 1 / _LARGEST and math.log10(high) - math.log10(low) > math.log10(60)
    if logarithmic and low > 1 / _LARGEST:
        return _logarithmic(low, high)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if high - low < 1 / _LARGEST:  # the same number, or two of which a fifth of the difference is none
        reach = abs(low) * 0.1 if abs(low) > 1 / _LARGEST else 1.0
        low, high = (low if zero and low == 0 else low - reach), high + reach
    step = _step((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, tuple(float(f"{n * step:.12g}") for n in range(first, last + 1)))


def step_axis(values: Sequence[float], count: int = 5) -> Axis:
    """The axis of steps: from 0, or the first, to exactly the last."""
    finite = [value for value in values if drawable(value)] or [0.0, 1.0]
    low, high = min(0.0, *finite), max(finite)
    if high <= low:
        high = low + 1
    step = _step((high - low) / count)
    step = max(1.0, step if step >= 10 else math.ceil(step))  # there is no step 2.5
    ticks = [low + n * step for n in range(int((high - low) / step) + 1)]
    if high - ticks[-1] > 0.4 * step:
        ticks.append(high)
    else:
        ticks[-1] = high if len(ticks) > 1 else ticks[-1]
    return Axis(low, high, tuple(ticks))


def thinned(points: Sequence[Point], shown: int = _SHOWN) -> list[Point]:
    """At most about ``shown`` points: of each stretch its first, least, greatest and last, so that no peak is lost.

    What is not finite stays, once a stretch: the line has a gap there.
    """
    if len(points) <= shown:
        return list(points)
    width = math.ceil(len(points) * 4 / shown)
    kept: list[Point] = []
    for begin in range(0, len(points), width):
        stretch = points[begin : begin + width]
        finite = [point for point in stretch if drawable(point[1])]
        chosen = (
            {stretch[0], stretch[-1]}
            if not finite
            else {
                finite[0],
                finite[-1],
                min(finite, key=lambda point: point[1]),
                max(finite, key=lambda point: point[1]),
            }
        )
        gap = next((point for point in stretch if not drawable(point[1])), None)
        kept += sorted({*chosen, *([gap] if gap is not None else [])}, key=lambda point: point[0])
    return kept


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """The mean of the ``window`` finite values around each point (fewer at the ends); gaps stay gaps."""
    if window <= 1:
        return list(points)
    half = window // 2
    sums, counts = [0.0], [0]
    for _, value in points:
        finite = drawable(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    mean: list[Point] = []
    for index, (x, value) in enumerate(points):
        if not drawable(value):
            mean.append((x, math.nan))
            continue
        begin, end = max(0, index - half), min(len(points), index + half + 1)
        mean.append((x, (sums[end] - sums[begin]) / (counts[end] - counts[begin])))
    return mean


def _logarithmic(low: float, high: float) -> Axis:
    """From a little below the least to a little above the greatest, ticks at 1, 2 and 5 or at powers of ten alone."""
    low, high = low / 1.2, high * 1.2
    decades = math.log10(high) - math.log10(low)
    factors = (1, 2, 5) if decades < 2.5 else (1,)
    every = max(1, math.ceil(decades / 6))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1, every)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return Axis(low, high, tuple(tick for tick in ticks if low <= tick <= high), logarithmic=True)


def _step(rough: float) -> float:
    """The nearest of 1, 2, 2.5, 5 and 10 times a power of ten that is not smaller."""
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if factor * power >= rough * (1 - 1e-9))
