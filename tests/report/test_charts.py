"""Where the marks of a chart stand."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from latentforge.report.axes import axis_of, smoothed, step_axis, thinned
from latentforge.report.chart import Chart, Mark, draw
from latentforge.report.words import duration, number, plain, short, size, worded

numbers = st.floats(allow_nan=True, allow_infinity=True) | st.floats(-1e6, 1e6) | st.floats(1e-9, 1.0)
sane = st.floats(-1e12, 1e12, allow_nan=False) | st.floats(1e-9, 1e9)


@settings(max_examples=60)
@given(st.lists(sane, min_size=1, max_size=12), st.booleans())
@example(values=[5e-324], zero=True)
@example(values=[5e-324, 1.5e-323], zero=False)
def test_an_axis_holds_every_value_and_its_ticks_rise(values: list[float], zero: bool) -> None:
    axis = axis_of(values, zero=zero)
    assert all(-1e-6 <= axis.at(value) <= 1 + 1e-6 for value in values)
    assert list(axis.ticks) == sorted(set(axis.ticks))
    assert 1 <= len(axis.ticks) <= 20


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 10**6), numbers), min_size=0, max_size=15))
def test_no_number_breaks_a_chart(points: list[tuple[int, float]]) -> None:
    mark = Mark("m", "student", tuple((float(x), y) for x, y in sorted(points, key=lambda one: one[0])), smooth=True)
    for dots in (False, True):
        drawn = draw(Chart("c", "C", "u", (mark, Mark("d", "twin", mark.points, dots=dots))))
        assert not any("nan" in stroke.path or "inf" in stroke.path for stroke in drawn.strokes)


@pytest.mark.parametrize(("last", "told"), [(math.nan, "not a number"), (math.inf, "∞"), (-math.inf, "−∞")])
@pytest.mark.parametrize("of_bytes", [False, True])
def test_a_line_that_ends_with_no_number_is_not_said_to_end_with_the_last_that_was_one(
    last: float, told: str, of_bytes: bool
) -> None:
    chart = Chart("c", "C", "u", (Mark("m", "student", ((1.0, 2.0), (2.0, 3.0), (3.0, last))),), bytes=of_bytes)
    drawn = draw(chart)
    assert drawn.keys[0].last == told
    assert drawn.said == f"C: m ends at {told}"


def test_thinning_keeps_the_peak_the_ends_and_the_gap() -> None:
    points = [(float(n), math.sin(n / 500)) for n in range(20000)]
    points[7777] = (7777.0, 99.0)
    points[9999] = (9999.0, math.nan)
    kept = thinned(points)
    assert len(kept) < 1000
    assert (7777.0, 99.0) in kept
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert any(math.isnan(value) for _, value in kept)


def test_the_strong_line_is_the_mean_of_its_neighbours() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 6.0)]
    assert smoothed(points, 3)[1] == (1.0, 1.5)
    assert math.isnan(smoothed(points, 3)[2][1])
    assert smoothed(points, 1) == points


def test_the_axis_of_steps_ends_at_the_last_step() -> None:
    assert step_axis([1, 500]).ticks == (0, 100, 200, 300, 400, 500)
    assert step_axis([1, 12]).ticks == (0, 3, 6, 9, 12)
    assert step_axis([1]).high == 1


@pytest.mark.parametrize(
    ("value", "told"),
    [(5.6224, "5.622"), (0.0705, "0.07050"), (229760, "229,760"), (1e-4, "1e-4"), (4.7619e-5, "4.76e-5"), (0.0, "0")],
)
def test_numbers_are_written_for_people(value: float, told: str) -> None:
    assert number(value) == told


def test_sizes_times_and_ticks_are_written_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1 << 20, 628281344)] == ["0 B", "1023 B", "1 MiB", "599 MiB"]
    assert [duration(s) for s in (0.053, 28.07, 65, 11520)] == ["0.053 s", "28.1 s", "1:05 min", "3:12:00 h"]
    assert [short(v) for v in (0, 0.25, 7500, 12500, 1.5e6)] == ["0", "0.25", "7500", "12.5k", "1.5M"]
    assert [short(1e300), size(2**511), size(2**62)] == ["1e300", "6.7e153 B", "4.61e18 B"]
    assert [worded(v) for v in (60, 0.5, None, "x", True, [1])] == ["60", "0.5000", "not recorded", "x", "True", "[1]"]
    assert plain("a\x1b\u202eb\n") == "a⟨U+001B⟩⟨U+202E⟩b\n"
