"""Kernels that are right one by one are tried together, in a child, before they meet in a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from latentforge.kernels.guard import composite
from latentforge.kernels.guard.composite import MicroStep, composites, micro_step
from latentforge.kernels.guard.ladder import Choice
from latentforge.kernels.guard.machine import Machine
from latentforge.kernels.guard.records import Record
from latentforge.kernels.guard.report import Report, render
from latentforge.kernels.guard.warmup import Line
from latentforge.kernels.guard.work import composite as task
from latentforge.verdicts import ExitCode

OPS = ("kd_loss", "linear_kd_loss", "latent_decode")
CHOICES = [Choice(op, dtype, "cpu") for op in OPS for dtype in ("bf16", "fp32")]


def test_a_step_of_the_chosen_kernels_passes_in_a_child(warm_up: Callable[..., list[Any]], machine: Machine) -> None:
    variants = composites(machine, CHOICES)
    assert [v.dtype for v in variants] == ["bf16", "fp32"]
    (line,) = warm_up(variants[0])
    assert (line.record.state, line.record.stage) == ("ok", "composite"), line.record.detail
    assert line.record.measured["taken_bytes"] >= 0
    (again,) = warm_up(variants[0])
    assert again.did == "known"


def test_an_operator_without_a_kernel_has_no_composite(machine: Machine) -> None:
    assert composites(machine, CHOICES[:-1]) == composites(machine, CHOICES)[:1]
    assert composites(machine, [replace(CHOICES[0], rung=None), *CHOICES[1:]]) == composites(machine, CHOICES)[1:]


def test_two_losses_of_one_step_agree_on_where_they_start(machine: Machine) -> None:
    (variant,) = composites(machine, [choice for choice in CHOICES if choice.dtype == "fp32"])
    found = micro_step(variant, torch.device("cpu"))
    assert found.finite
    # The teacher is the student at its start, and the second loss follows one AdamW step.
    assert 0 < found.losses[1] < found.losses[0] * 1.1


@pytest.mark.parametrize("found", [MicroStep((1.0, float("nan")), True, 0, 0), MicroStep((1.0, 1.0), False, 0, 0)])
def test_numbers_that_are_none_fail(found: MicroStep, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    (variant,) = composites(machine, [choice for choice in CHOICES if choice.dtype == "fp32"])
    monkeypatch.setattr(composite, "micro_step", lambda variant, device: found)
    assert task({"variant": variant.as_json()}, lambda stage: None)["reason"] == "nan"


def test_kernels_that_fail_together_make_the_host_unfit(warm_up: Callable[..., list[Any]], machine: Machine) -> None:
    broken = replace(composites(machine, CHOICES)[0], shapes=((2, 16, 32, -1),))
    (line,) = warm_up(broken)
    assert line.record.state == "failed"
    report = Report(machine, [line], CHOICES)
    assert report.code is ExitCode.FAIL
    assert "fail together" in render(report)


def test_an_accepted_crash_of_a_micro_step_has_no_fallback_to_live_with(machine: Machine) -> None:
    (variant, _) = composites(machine, CHOICES)
    crash = Record(variant.name, "0", "crashed", reason="host_crash", finished=1.0)
    assert Report(machine, [Line(variant, crash, "crash found")], CHOICES).code is ExitCode.UNKNOWN
    accepted = Line(variant, replace(crash, accepted=True), "crash accepted")
    assert Report(machine, [accepted], CHOICES).code is ExitCode.FAIL
