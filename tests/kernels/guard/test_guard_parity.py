"""A kernel that is wrong in one way is caught, under the reason that is true of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import guard_stubs
import pytest
import torch

from latentforge.kernels.guard.parity import Proof, prove
from latentforge.kernels.guard.variants import Variant
from latentforge.kernels.guard.work import make_trial

SHAPES = ((2, 33), (5, 103))


def proof_of(entry: Callable[..., Any], *, dtype: str = "fp32", targets: str = "dense", **options: Any) -> Proof:
    variant = Variant("kd_loss", dtype, "cpu", "stub:stub", targets=targets, device="cpu")  # type: ignore[arg-type]
    return prove(entry, SHAPES, make_trial(variant, torch.device("cpu")), **options)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("targets", ["dense", "topk"])
def test_the_reference_is_right(dtype: str, targets: str) -> None:
    found = proof_of(guard_stubs.good, dtype=dtype, targets=targets)
    assert found.reason is None, found.detail
    assert found.worst < 1.0
    assert found.shapes == list(SHAPES)


def test_the_cpu_kernel_is_right() -> None:
    from latentforge.kernels.cpu.kd import row_losses

    found = proof_of(row_losses, dtype="bf16")
    assert found.reason is None, found.detail


FAULTS: list[tuple[Callable[..., Any], str]] = [
    (guard_stubs.wrong_first(), "mismatch_first_call"),
    (guard_stubs.wrong_second(), "mismatch_later_call"),
    (guard_stubs.wrong_third(), "mismatch_later_call"),
    (guard_stubs.wrong_after_another_shape(), "mismatch_later_call"),
    (guard_stubs.writes_beside, "oob_write"),
    (guard_stubs.writes_before, "oob_write"),
    (guard_stubs.writes_teacher, "input_modified"),
    (guard_stubs.writes_without_gradient, "input_modified"),
    (guard_stubs.gives_nan, "nan"),
    (guard_stubs.all_zero, "mismatch_first_call"),
    (guard_stubs.constant_losses, "mismatch_first_call"),
    (guard_stubs.nondeterministic(), "nondeterministic"),
]


@pytest.mark.parametrize(("entry", "reason"), FAULTS, ids=[str(number) for number in range(len(FAULTS))])
def test_a_faulty_kernel_is_caught_under_its_reason(entry: Callable[..., Any], reason: str) -> None:
    found = proof_of(entry)
    assert found.reason == reason, found.detail
    assert "shape" in found.detail


def test_a_kernel_that_takes_an_absent_entry_for_a_token_is_caught() -> None:
    assert proof_of(guard_stubs.absent_is_a_token).reason is None
    assert proof_of(guard_stubs.absent_is_a_token, targets="topk").reason is not None


def test_differing_bits_are_accepted_of_a_kernel_that_does_not_promise_them() -> None:
    assert proof_of(guard_stubs.nondeterministic(), deterministic=False).reason is None


def test_nothing_compared_is_no_proof() -> None:
    variant = Variant("kd_loss", "fp32", "cpu", "stub:stub", device="cpu")
    assert prove(guard_stubs.good, (), make_trial(variant, torch.device("cpu"))).reason is not None


def test_constant_output_fails_whatever_its_error() -> None:
    # Zero for a gradient that is nearly zero: the error alone would be small in absolute terms.
    found = proof_of(guard_stubs.all_zero)
    assert "are 0" in found.detail
