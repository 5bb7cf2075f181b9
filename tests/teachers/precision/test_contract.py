"""The contract of the teacher's path: it holds here as far as it can be seen here, and each planted fault is seen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

from latentforge.contracts import contracts_folder, load_contracts
from latentforge.teachers import precision_checks
from latentforge.teachers.precision_checks import (
    default_takes_the_fast_path,
    quantised_within_its_noise,
    steps_in_time,
)

(CONTRACT,) = (one for one in load_contracts(contracts_folder()) if one.contract == "teacher-backend")


def test_na_read_as_idle_and_halved_scales_are_seen_too() -> None:
    assert default_takes_the_fast_path(mutant="na_is_idle").passed is False
    assert quantised_within_its_noise(mutant="halved").passed is False


def test_the_check_of_500_steps_fails_on_the_processor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that goes on by what each device takes for its tokens: the mutant is all that differs.
    now, rates = [0.0], {"meta": 5000.0, "cpu": 50.0}

    def timed(self: Qwen2ForCausalLM, input_ids: torch.Tensor, **settings: Any) -> None:
        now[0] += input_ids.numel() / rates[input_ids.device.type]

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", timed)
    monkeypatch.setattr(precision_checks, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    fast, slow = (steps_in_time(shape="tiny", device="meta", mutant=mutant) for mutant in (None, "cpu"))
    assert (fast.passed, fast.measured["device"]) == (True, "meta")
    assert (slow.passed, slow.measured["device"]) == (False, "cpu")


def test_without_a_gpu_the_500_steps_are_unknown_and_not_passed() -> None:
    (one,) = (falsifier for falsifier in CONTRACT.falsifiers if falsifier.id == "F-BACKEND-SELECT-003")
    assert one.scope is not None
    assert one.scope.device == "cuda"
