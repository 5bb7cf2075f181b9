"""The contract of the teacher's path: it holds here as far as it can be seen here, and each planted fault is seen."""

from __future__ import annotations

from latentforge.contracts import contracts_folder, load_contracts
from latentforge.teachers.precision_checks import (
    default_takes_the_fast_path,
    quantised_within_its_noise,
    steps_in_time,
)

(CONTRACT,) = (one for one in load_contracts(contracts_folder()) if one.contract == "teacher-backend")


def test_na_read_as_idle_and_halved_scales_are_seen_too() -> None:
    assert default_takes_the_fast_path(mutant="na_is_idle").passed is False
    assert quantised_within_its_noise(mutant="halved").passed is False


def test_the_check_of_500_steps_measures_and_can_fail_where_there_is_no_gpu() -> None:
    fast = steps_in_time(shape="tiny", device="cpu", minutes=1e6)
    assert fast.passed is True
    assert fast.measured["device"] == "cpu"
    slow = steps_in_time(shape="tiny", device="cpu", minutes=1e6, steps=10**13, mutant="cpu")
    assert slow.passed is False


def test_without_a_gpu_the_500_steps_are_unknown_and_not_passed() -> None:
    (one,) = (falsifier for falsifier in CONTRACT.falsifiers if falsifier.id == "F-BACKEND-SELECT-003")
    assert one.scope is not None
    assert one.scope.device == "cuda"
