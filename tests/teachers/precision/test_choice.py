"""The path that a teacher computes by: decided by what was measured, by no name, and by nothing that is not known."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentforge.errors import RefusedError
from latentforge.teachers.precision import Trial, choose_precision, paths_of, try_paths
from latentforge.teachers.utilisation import IDLE_PERCENT, IdleWatch, parse_utilisation

PRECISIONS = ("fp32", "bf16", "quantized")
speeds = st.floats(0.1, 1e7)
uses = st.none() | st.floats(0.0, 100.0)


@st.composite
def trials(draw: st.DrawFn) -> list[Trial]:
    found = []
    for precision in draw(st.lists(st.sampled_from(PRECISIONS), min_size=1, unique=True)):
        if draw(st.booleans()) and draw(st.booleans()):
            found.append(Trial(precision, refused="no"))
        else:
            found.append(Trial(precision, draw(speeds), draw(uses)))
    return found


def able(found: list[Trial]) -> list[Trial]:
    return [trial for trial in found if trial.refused is None]


@given(trials())
def test_a_path_that_leaves_the_gpu_idle_is_never_taken_beside_one_that_does_not(found: list[Trial]) -> None:
    if not able(found):
        with pytest.raises(RefusedError, match="cannot be computed here"):
            choose_precision("auto", found, gpu=True)
        return
    choice = choose_precision("auto", found, gpu=True)
    taken = next(trial for trial in found if trial.precision == choice.precision)
    assert taken.refused is None
    awake = [trial for trial in able(found) if not trial.idle]
    assert choice.idle == (not awake)
    assert not (awake and taken.idle)
    fit = awake or able(found)
    assert (taken.tokens_per_second or 0) >= 0.95 * max(trial.tokens_per_second or 0 for trial in fit)
    assert choice.precision in choice.reason


@given(trials(), st.randoms())
def test_the_order_of_the_trials_decides_nothing(found: list[Trial], random: Any) -> None:
    if not able(found):
        return
    mixed = list(found)
    random.shuffle(mixed)
    assert choose_precision("auto", found, gpu=True) == choose_precision("auto", mixed, gpu=True)


@given(trials(), st.floats(0.1, 10.0))
def test_a_machine_that_is_faster_by_some_factor_takes_the_same_path_unless_speeds_are_at_the_edge(
    found: list[Trial], factor: float
) -> None:
    if not able(found):
        return
    best = max(t.tokens_per_second or 0 for t in able(found))
    if any(0.949 < (t.tokens_per_second or 0) / other.tokens_per_second < 0.951
           for t, other in itertools.permutations(able(found), 2) if other.tokens_per_second):  # fmt: skip
        return
    scaled = [t if t.refused else Trial(t.precision, (t.tokens_per_second or 0) * factor, t.utilisation) for t in found]
    assert best > 0
    taken = [choose_precision("auto", these, gpu=True).precision for these in (found, scaled)]
    assert taken[0] == taken[1]


@given(st.lists(st.sampled_from(PRECISIONS), min_size=1, unique=True), speeds)
def test_unknown_utilisation_is_not_idle(names: list[Any], speed: float) -> None:
    found = [Trial(name, speed, None) for name in names]
    choice = choose_precision("auto", found, gpu=True)
    assert not choice.idle
    assert "utilisation unknown" in choice.reason


def test_the_slow_path_beside_an_idle_gpu_is_not_taken_though_it_is_asked_for_first() -> None:
    # aprender's night: the quantised teacher ran on the CPU, 1320 % of it, and the GPU stood at 0 %.
    found = [Trial("quantized", 41.0, 0.0), Trial("bf16", 3900.0, 97.0)]
    choice = choose_precision("auto", found, gpu=True)
    assert choice.precision == "bf16"
    assert choice.reason == ("bf16 3900 tokens/s, GPU 97 % busy (others: quantized 41 tokens/s, GPU 0 % busy)")


def test_an_idle_path_is_passed_over_even_where_it_is_the_faster_one() -> None:
    found = [Trial("quantized", 9000.0, IDLE_PERCENT - 1), Trial("bf16", 3900.0, 60.0)]
    assert choose_precision("auto", found, gpu=True).precision == "bf16"
    alone = choose_precision("auto", found[:1], gpu=True)
    assert (alone.idle, alone.precision) == (True, "quantized")
    assert alone.reason.startswith("every path leaves the GPU idle")


def test_of_paths_that_are_as_fast_the_fuller_one_is_taken() -> None:
    found = [Trial("bf16", 1000.0, 95.0), Trial("fp32", 960.0, 96.0)]
    assert choose_precision("auto", found, gpu=True).precision == "fp32"
    assert choose_precision("auto", [found[0], Trial("fp32", 900.0, 96.0)], gpu=True).precision == "bf16"


def test_what_is_asked_is_taken_or_refused_with_its_reason_and_never_replaced() -> None:
    slow = Trial("fp32", 1.0, 0.0)
    assert choose_precision("fp32", [slow], gpu=True).precision == "fp32"
    with pytest.raises(RefusedError, match="bf16 cannot be taken \\(no room\\)"):
        choose_precision("bf16", [Trial("bf16", refused="no room")], gpu=True)


def test_without_a_gpu_it_is_fp32_and_the_reason_says_so() -> None:
    (only,) = paths_of("auto", gpu=False, quantization=None)
    choice = choose_precision("auto", [Trial(only)], gpu=False)
    assert (choice.precision, choice.device) == ("fp32", "cpu")
    assert choice.reason.startswith("no GPU: fp32")


@pytest.mark.parametrize(
    ("asked", "gpu", "method", "stored", "paths"),
    [
        ("auto", True, None, "BF16", ("bf16",)),
        ("auto", True, None, "F32", ("bf16", "fp32")),
        ("auto", True, "fp8", None, ("quantized", "bf16")),
        ("auto", False, "fp8", None, ("quantized",)),
        ("bf16", False, None, None, ("bf16",)),
        ("bf16", True, "fp8", None, ("bf16",)),
        ("quantized", True, "fp8", None, ("quantized",)),
    ],
)
def test_the_paths_that_are_tried_follow_from_the_folder(
    asked: Any, gpu: bool, method: str | None, stored: str | None, paths: tuple[str, ...]
) -> None:
    assert paths_of(asked, gpu=gpu, quantization=method, stored=stored) == paths


def test_quantized_is_refused_where_the_folder_is_not() -> None:
    with pytest.raises(RefusedError, match="is not quantised"):
        paths_of("quantized", gpu=True, quantization=None)


def test_each_path_is_let_go_before_the_next_is_loaded_and_what_fails_is_a_reason() -> None:
    held: list[str] = []

    class Opened:
        def __init__(self, name: str) -> None:
            assert not held, "two teachers at once"
            held.append(name)

        def close(self) -> None:
            held.clear()

    def measured(teacher: Any) -> tuple[float, float | None]:
        if held == ["fp32"]:
            raise RuntimeError("CUDA error: no kernel image\nmore")
        return 10.0, None

    def opened(name: Any) -> Any:
        if name == "quantized":
            raise RefusedError("needs a package")
        return Opened(name)

    found = try_paths(("quantized", "fp32", "bf16"), opened, measured)
    assert found == [
        Trial("quantized", refused="needs a package"),
        Trial("fp32", refused="CUDA error: no kernel image"),
        Trial("bf16", 10.0),
    ]


# Answers of nvidia-smi as GB10 hosts and others give them: section 4 of the GB10 notes, and the vendor's known issues.
@pytest.mark.parametrize(
    ("answer", "percent"),
    [
        ("96\n", 96.0), ("0\n", 0.0), ("0 %\n", 0.0), ("[N/A]\n", None), ("[Not Supported]\n", None), ("", None),
        ("N/A\n", None), ("[Unknown Error]\n", None), ("nan\n", None), ("3\n97\n", 97.0), ("[N/A]\n12\n", 12.0),
        ("Unable to determine the device handle for GPU 0000:01:00.0: Unknown Error\n", None), ("400\n", None),
    ],
)  # fmt: skip
def test_what_nvidia_smi_does_not_tell_is_unknown(answer: str, percent: float | None) -> None:
    assert parse_utilisation(answer) == percent


def fed(readings: list[float | None], every: float = 2.0) -> tuple[IdleWatch, list[float]]:
    watch, said = IdleWatch(), []
    for number, value in enumerate(readings):
        if watch.see(number * every, value) is not None:
            said.append(number * every)
    return watch, said


def test_a_gpu_that_is_left_idle_is_said_once_and_within_a_minute() -> None:
    watch, said = fed([0.0] * 60)
    assert said == [30.0]
    assert watch.reported
    _, later = fed([95.0] * 20 + [3.0] * 40)
    assert later == [40.0 + 30.0]


def test_a_gpu_that_tells_nothing_is_never_called_idle() -> None:
    watch, said = fed([None] * 200)
    assert (said, watch.median) == ([], None)


def test_pauses_of_a_busy_teacher_are_not_idleness() -> None:
    assert fed([0.0, 0.0, 90.0, 0.0, 0.0] * 30)[1] == []
    assert fed([0.0] * 10 + [None] * 3 + [0.0] * 10)[1] == [30.0]


@given(st.lists(st.none() | st.floats(0, 100), max_size=200))
def test_idleness_is_reported_exactly_where_half_a_minute_of_it_was_read(readings: list[float | None]) -> None:
    watch, said = fed(readings)
    since, count, expected = None, 0, False
    for number, value in enumerate(readings):
        if value is None:
            continue
        if value >= IDLE_PERCENT:
            since, count = None, 0
            continue
        since = 2.0 * number if since is None else since
        count += 1
        expected |= 2.0 * number - since >= 30.0 and count >= 5
    assert watch.reported is expected
    assert len(said) == int(expected)
