"""Charts as data, and where each of their marks stands: one description for the page, the plots and the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from latentforge.report.axes import Axis, Point, axis_of, drawable, smoothed, step_axis, thinned
from latentforge.report.words import number, short, size

COLOURS = 6
"""Colours that tell series apart: after the last the first comes again."""
WIDTH, HEIGHT = 1000, 300
"""The units of a plot area; the page stretches it to its own."""


@dataclass(frozen=True)
class Mark:
    """A line, or dots where ``dots``, of one name; ``who`` chooses its colour (a model's name, or ``run0`` …).

    ``whiskers`` are intervals ``(x, low, high)``; ``smooth`` draws each point faintly and the mean of some around it
    strongly; ``levels`` holds each value until the next.
    """

    name: str
    who: str
    points: tuple[Point, ...]
    dots: bool = False
    smooth: bool = False
    levels: bool = False
    whiskers: tuple[tuple[float, float, float], ...] = ()

    @cached_property
    def finite(self) -> tuple[Point, ...]:
        """The points that have a place in the picture."""
        return tuple(point for point in self.points if drawable(point[0]) and drawable(point[1]))


@dataclass(frozen=True)
class Chart:
    """One picture. ``name`` is a file's name, ``unit`` stands beside the title, ``across`` below the x axis."""

    name: str
    title: str
    unit: str
    marks: tuple[Mark, ...]
    across: str = "step"
    zero: bool = False
    note: str | None = None
    steps: bool = True
    bytes: bool = False


@dataclass(frozen=True)
class Tick:
    """A tick's label and where it stands, in percent of the plot from its left or its top."""

    label: str
    at: float


@dataclass(frozen=True)
class Stroke:
    """A path in the units of the plot area; ``kind`` is ``line``, ``faint``, ``dots`` or ``whisker``."""

    who: str
    kind: str
    path: str


@dataclass(frozen=True)
class Key:
    """A line of the legend: the mark and its last value."""

    who: str
    name: str
    dots: bool
    last: str


@dataclass(frozen=True)
class Drawn:
    """A chart with everything in its place."""

    chart: Chart
    ups: tuple[Tick, ...]
    acrosses: tuple[Tick, ...]
    strokes: tuple[Stroke, ...]
    keys: tuple[Key, ...]
    notes: tuple[str, ...] = ()
    said: str = field(default="")


def draw(chart: Chart) -> Drawn:
    """Place everything of a chart: ticks in percent, paths in ``WIDTH`` x ``HEIGHT``. What is not finite is a gap."""
    x, y = axes(chart)
    strokes = [stroke for mark in chart.marks for stroke in _strokes(mark, x, y)]
    unit = bytes_label if chart.bytes else short
    notes = [*_gaps(chart), *([chart.note] if chart.note else [])]
    if any(window(mark) > 1 for mark in chart.marks):
        notes.insert(0, f"faint: each step; strong: mean of {max(window(mark) for mark in chart.marks)}")
    if y.logarithmic:
        notes.insert(0, "logarithmic scale")
    keys = tuple(Key(mark.who, mark.name, mark.dots, last_told(chart, mark)) for mark in chart.marks)
    return Drawn(
        chart,
        tuple(Tick(unit(tick), 100 * (1 - y.at(tick))) for tick in y.ticks),
        tuple(Tick(short(tick), 100 * x.at(tick)) for tick in x.ticks),
        tuple(strokes),
        keys,
        tuple(notes),
        f"{chart.title}: " + ", ".join(f"{key.name} ends at {key.last}" for key in keys),
    )


def last_told(chart: Chart, mark: Mark) -> str:
    """The last value of a mark, also where it is no number that a picture could show."""
    if not mark.points:
        return "–"
    value = mark.points[-1][1]
    return bytes_label(value) if chart.bytes and drawable(value) else number(value)


def colour(number: int) -> str:
    """The colour of the series of that number, from 0."""
    return f"run{number % COLOURS}"


def axes(chart: Chart) -> tuple[Axis, Axis]:
    """The axes that hold all of a chart's marks."""
    points = [point for mark in chart.marks for point in mark.finite]
    ups = [value for _, value in points] + [end for mark in chart.marks for _, *ends in mark.whiskers for end in ends]
    across = [value for value, _ in points]
    x = step_axis(across) if chart.steps else axis_of(across, zero=True, logarithmic=False)
    return x, _memory_axis(ups) if chart.bytes else axis_of(ups, zero=chart.zero)


def window(mark: Mark) -> int:
    """How many points the strong line of a mark is the mean of: a twenty-fifth of all, an odd number."""
    return max(1, len(mark.points) // 25) | 1 if mark.smooth and len(mark.points) >= 50 else 1


def _strokes(mark: Mark, x: Axis, y: Axis) -> list[Stroke]:
    if mark.dots:
        dots = [f"M{_at(x, a)} {_down(y, b)}h0" for a, b in mark.finite]
        whiskers = [
            f"M{_at(x, a)} {_down(y, low)}V{_down(y, high)}" for a, low, high in mark.whiskers if _placed(a, low, high)
        ]
        drawn = [Stroke(mark.who, "whisker", "".join(whiskers))] if whiskers else []
        return [*drawn, Stroke(mark.who, "dots", "".join(dots))]
    over = window(mark)
    faint = [Stroke(mark.who, "faint", _path(thinned(mark.points), x, y, mark.levels))] if over > 1 else []
    return [*faint, Stroke(mark.who, "line", _path(thinned(smoothed(mark.points, over)), x, y, mark.levels))]


def _path(points: Sequence[Point], x: Axis, y: Axis, levels: bool) -> str:
    parts: list[str] = []
    pen = False
    for index, (across, up) in enumerate(points):
        if not (drawable(across) and drawable(up)):
            pen = False
            continue
        place = f"{_at(x, across)} {_down(y, up)}"
        if pen and levels:
            parts.append(f"H{_at(x, across)}V{_down(y, up)}")
        else:
            parts.append(f"{'L' if pen else 'M'}{place}")
        following = points[index + 1] if index + 1 < len(points) else None
        if not pen and (following is None or not drawable(following[1])):
            parts.append("h0")  # a point alone: a dot, by the line's round end
        pen = True
    return "".join(parts)


def _at(x: Axis, value: float) -> str:
    return f"{WIDTH * x.at(value):.1f}".removesuffix(".0")


def _down(y: Axis, value: float) -> str:
    if y.logarithmic and value <= 0:
        return str(HEIGHT)
    return f"{HEIGHT * (1 - y.at(value)):.1f}".removesuffix(".0")


def _gaps(chart: Chart) -> list[str]:
    """What of a chart has no place in the picture, a line a mark."""
    told = []
    for mark in chart.marks:
        wrong = [across for across, value in mark.points if not _placed(across, value)]
        if wrong:
            first = f", the first at step {number(int(wrong[0]))}" if chart.steps else ""
            told.append(f"{mark.name}: {number(len(wrong))} of {number(len(mark.points))} values are not finite{first}")
        if not all(_placed(*whisker) for whisker in mark.whiskers):
            told.append(f"{mark.name}: its interval is not finite")
    return told


def _placed(*values: float) -> bool:
    return all(map(drawable, values))


def _memory_axis(values: Sequence[float]) -> Axis:
    greatest = max((value for value in values if drawable(value)), default=1.0)
    unit = 2.0 ** (10 * max(0, math.floor(math.log2(max(greatest, 1.0)) / 10)))
    inner = axis_of([value / unit for value in values], zero=True)
    return Axis(inner.low * unit, inner.high * unit, tuple(tick * unit for tick in inner.ticks))


def bytes_label(value: float) -> str:
    """A tick of memory."""
    return "0" if value == 0 else size(value)
