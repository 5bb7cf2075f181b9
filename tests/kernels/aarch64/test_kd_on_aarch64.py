"""The KD loss of the cpu backend on aarch64, in each of its variants, against the definition in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from latentforge.kernels.cpu import kd as cpu
from latentforge.kernels.native import native
from latentforge.kernels.parity.kd import Case, compare
from latentforge.kernels.targets import DenseTargets, TopKTargets

VARIANTS = ("neon_bf16", "neon", "baseline")
BF16, FP32 = torch.bfloat16, torch.float32


def test_the_best_variant_that_the_processor_can_run_is_first(start: Callable[..., Any]) -> None:
    assert start("max").cpu_variants() == ["neon_bf16", "neon", "baseline"]
    assert start("cortex-a57").cpu_variants() == ["neon", "baseline"]


def test_a_processor_without_bf16_refuses_its_variant_and_runs_the_others(start: Callable[..., Any]) -> None:
    case = Case(1003, BF16, BF16, 2.0, rows=4)
    with start("cortex-a57").in_place():
        with pytest.raises(ValueError, match="neon_bf16"):
            compare(case, isa="neon_bf16")
        # An instruction that the processor lacks would end the emulated process.
        for k in (None, 9):
            for dtype in (BF16, FP32):
                for variant in ("neon", "baseline"):
                    assert compare(Case(1003, dtype, dtype, 2.0, k=k, rows=4), isa=variant).passed


def test_what_runs_there_was_built_from_these_sources(arm: Any) -> None:
    assert native() is arm  # native() refuses an extension of other sources


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("k", [None, 20])
def test_errors_are_no_worse_than_torchs(
    arm: Any, k: int | None, temperature: float, dtype: torch.dtype, variant: str
) -> None:
    result = compare(Case(5003, dtype, dtype, temperature, k=k, rows=6, padding=0 if k else 7), isa=variant)
    assert result.passed, result


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("k", [None, 20])
def test_odd_rows_at_odd_addresses_are_right_and_nothing_else_is_written(
    arm: Any, k: int | None, dtype: torch.dtype, variant: str
) -> None:
    # NaN, infinities, rows whose first block says nothing of the rest; rows further apart than they are wide.
    for case in (
        Case(2051, dtype, dtype, 2.0, k=k, misaligned=True, edge="rows"),
        Case(2051, dtype, dtype, 1.7, k=k, misaligned=True, padding=0 if k else 130, width=20.0, noise=0.02),
        Case(3, dtype, dtype, 4.0, k=None if k is None else 2, rows=5),
        Case(2051, dtype, dtype, 2.0, k=k, rows=7, edge=None if k is None else "mixed k"),
    ):
        result = compare(case, isa=variant)
        assert result.passed, result


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("direction", ["reverse", "jsd"])
def test_other_directions_and_shaped_logits_are_right(
    arm: Any, direction: str, dtype: torch.dtype, variant: str
) -> None:
    for case in (
        Case(2051, dtype, dtype, 2.0, direction=direction, rows=6),
        Case(2051, dtype, dtype, 2.0, direction=direction, bias=True, logit_scale=0.5, soft_cap=20.0, rows=6),
        Case(2051, dtype, dtype, 1.0, k=20, direction="reverse", rows=6),
    ):
        result = compare(case, isa=variant)
        assert result.passed, result


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_student_and_teacher_of_two_precisions_are_walked_in_one_order(arm: Any, variant: str) -> None:
    for types in ((BF16, FP32), (FP32, BF16)):
        result = compare(Case(1999, *types, 2.0, rows=6), isa=variant)
        assert result.passed, result


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["dense", "topk"])
def test_bits_do_not_depend_on_threads_or_on_the_rest_of_the_batch(arm: Any, kind: str, variant: str) -> None:
    # Four rows of this width are worth two threads.
    case = Case(140001, BF16, BF16, 3.0, k=20 if kind == "topk" else None, rows=4)
    student, targets, labels = case.tensors()
    labels[:2] = 5

    def run(rows: slice, threads: int) -> list[Tensor]:
        gradient = student[rows].clone()
        if isinstance(targets, DenseTargets):
            part: DenseTargets | TopKTargets = DenseTargets(targets.logits[rows])
        else:
            part = TopKTargets(targets.ids[rows], targets.logprobs[rows], targets.tail[rows])
        given = {"write_gradient": True, "isa": variant, "threads": threads}
        return [*cpu.row_losses(gradient, part, labels[rows], case.settings, **given), gradient]

    first = run(slice(0, 4), 1)
    assert all(torch.equal(a, b) for a, b in zip(first, run(slice(0, 4), 2), strict=True))
    assert all(torch.equal(a[1:3], b) for a, b in zip(first, run(slice(1, 3), 1), strict=True))
