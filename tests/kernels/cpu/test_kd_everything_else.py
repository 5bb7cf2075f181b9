"""Directions, shaped logits, odd strides and addresses, gradients in buffers of their own: the C++ backend on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.cpu import kd as cpu
from latentforge.kernels.native import native
from latentforge.kernels.parity.kd import Case, compare
from latentforge.kernels.parity.kd_grid import grid
from latentforge.kernels.reference import kd as reference
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets

VARIANTS = list(native().cpu_variants())
BF16, FP32 = torch.bfloat16, torch.float32
DIRECTIONS = ("forward", "reverse", "jsd")


def exact(case: Case, student: Tensor, targets: Targets, labels: Tensor | None) -> reference.RowLosses:
    if isinstance(targets, DenseTargets):
        targets = DenseTargets(targets.logits.double())
    return reference.row_losses(
        student.double(), targets, labels, case.settings, bias=case.bias_tensor(), gradient=True
    )


def kernel(
    case: Case, student: Tensor, targets: Targets, labels: Tensor | None, variant: str, threads: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """On a fresh copy of the student."""
    gradient = student.clone()
    ce, kd = cpu.row_losses(
        gradient,
        targets,
        labels,
        case.settings,
        bias=case.bias_tensor(),
        write_gradient=True,
        isa=variant,
        threads=threads,
    )
    return ce, kd, gradient


@st.composite
def cases(draw: st.DrawFn) -> Case:
    vocab = draw(st.sampled_from([2, 5, 31, 32, 33, 100, 1023, 1024, 1056, 2083]))
    k = draw(st.none() | st.integers(1, min(vocab, 140)))
    dtype = draw(st.sampled_from([BF16, FP32]))
    return Case(
        vocab,
        dtype,
        draw(st.sampled_from([BF16, FP32])),
        draw(st.sampled_from([1.0, 2.0, 3.0, 0.7])),
        k=k,
        noise=draw(st.sampled_from([0.7, 0.02])),
        width=draw(st.sampled_from([1.0, 20.0])),
        padding=0 if k else draw(st.integers(0, min(5, vocab - 2))),
        rows=draw(st.integers(3, 5)),
        direction=draw(st.sampled_from(DIRECTIONS)),
        beta=draw(st.sampled_from([0.1, 0.5, 0.8])),
        teacher_temperature=draw(st.sampled_from([None, 1.5])),
        ce=draw(st.sampled_from([0.3, 0.0])),
        bias=draw(st.booleans()),
        logit_scale=draw(st.sampled_from([1.0, 0.3])),
        soft_cap=draw(st.sampled_from([None, None, 25.0])),
        misaligned=draw(st.booleans()),
    )


@settings(max_examples=400, derandomize=True)
@given(case=cases(), variant=st.sampled_from(VARIANTS))
def test_any_direction_and_shaping_agrees_with_fp64(case: Case, variant: str) -> None:
    student, targets, labels = case.tensors()
    truth = exact(case, student, targets, labels)
    ce, kd, gradient = kernel(case, student, targets, labels, variant)
    assert truth.gradient is not None
    # Entries are probabilities (at most 1) times weights, and for reverse KL times a gap between logits.
    reach = 1.0 + float(student.double().nan_to_num(neginf=0.0).abs().max()) / case.temperature
    size = (case.settings.ce_scale + case.settings.kd_scale / case.temperature) * max(1.0, case.logit_scale)
    size *= reach if case.direction == "reverse" else 1.0
    precision = (2**-8 if case.student_dtype == BF16 else 2**-20) * truth.gradient.abs()
    fine = (gradient.double() - truth.gradient).abs() <= precision + 8e-6 * size
    assert (fine | (gradient.isnan() & truth.gradient.isnan())).all()
    assert torch.allclose(ce, truth.ce, rtol=1e-6, atol=8e-6 + 2e-7 * reach, equal_nan=True)
    assert torch.allclose(kd, truth.kd, rtol=1e-5, atol=8e-6 + 1e-6 * reach, equal_nan=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_case_of_the_quick_grid_is_as_exact_as_torch(variant: str) -> None:
    for group, case in grid(quick=True):
        result = compare(case, isa=variant)
        assert result.passed, (group, result)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [None, 64])
def test_a_close_teacher_costs_no_more_than_the_rounding_of_the_gradient(k: int | None, variant: str) -> None:
    # KL alone between near equals: whatever the exponential loses shows here, multiplied by 50.
    for temperature in (1.0, 2.0, 4.0):
        result = compare(Case(50257, BF16, BF16, temperature, k=k, noise=0.02, ce=0.0, rows=4), isa=variant)
        assert result.passed, result


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("k", [None, 7])
def test_columns_that_do_not_lie_side_by_side_are_read_and_written_where_they_lie(
    k: int | None, direction: str, variant: str
) -> None:
    for dtype, bias in ((BF16, False), (FP32, False), (BF16, True)):
        case = Case(1043, dtype, dtype, 2.0, k=k, rows=4, direction=direction, bias=bias)
        student, targets, labels = case.tensors()
        plain = kernel(case, student.float(), targets, labels, variant)
        around = torch.full((1043, 9), 7.5, dtype=dtype)
        scattered = around.t()[2:6]
        scattered.copy_(student)
        if isinstance(targets, DenseTargets):
            targets = DenseTargets(targets.logits.t().contiguous().t())
        ce, kd = cpu.row_losses(
            scattered, targets, labels, case.settings, bias=case.bias_tensor(), write_gradient=True, isa=variant
        )
        assert torch.allclose(ce, plain[0], atol=1e-6)
        assert torch.allclose(kd, plain[1], atol=1e-5)
        assert torch.allclose(scattered.float(), plain[2].to(dtype).float(), rtol=2**-7, atol=1e-7)
        assert (around[:, :2] == 7.5).all()
        assert (around[:, 6:] == 7.5).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("student_dtype", [BF16, FP32])
@pytest.mark.parametrize("out_dtype", [BF16, FP32])
@pytest.mark.parametrize("shaped", [False, True])
def test_a_gradient_can_go_elsewhere_and_then_the_student_is_only_read(
    shaped: bool, out_dtype: torch.dtype, student_dtype: torch.dtype, variant: str
) -> None:
    for k, direction in ((None, "forward"), (None, "reverse"), (None, "jsd"), (9, "forward"), (9, "reverse")):
        case = Case(1109, student_dtype, student_dtype, 2.0, k=k, rows=5, direction=direction)
        if shaped:
            case = replace(case, bias=True, soft_cap=20.0, logit_scale=0.5)
        student, targets, labels = case.tensors()
        truth = exact(case, student, targets, labels)
        kept, around = student.clone(), torch.full((5, 1112), 7.5, dtype=out_dtype)
        out = around[:, 1:1110]
        ce, kd = cpu.row_losses(
            student,
            targets,
            labels,
            case.settings,
            bias=case.bias_tensor(),
            write_gradient=True,
            gradient_out=out,
            isa=variant,
        )
        assert torch.equal(student, kept)
        assert truth.gradient is not None
        error = float((out.double() - truth.gradient).norm() / truth.gradient.norm())
        assert error < (3e-3 if out_dtype == BF16 else 2e-5)
        assert torch.allclose(ce, truth.ce, atol=1e-5)
        assert torch.allclose(kd, truth.kd, atol=1e-5)
        assert (around[:, 0] == 7.5).all()
        assert (around[:, 1110:] == 7.5).all()


def test_a_gradient_buffer_of_another_shape_or_type_is_refused() -> None:
    case = Case(40, BF16, BF16, 2.0, rows=3)
    student, targets, labels = case.tensors()
    for wrong, word in ((torch.empty(3, 41, dtype=BF16), "41"), (torch.empty(3, 40, dtype=torch.float16), "float16")):
        with pytest.raises(RefusedError, match=word):
            cpu.row_losses(student, targets, labels, case.settings, write_gradient=True, gradient_out=wrong)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("k", [None, 6])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_without_a_gradient_nothing_is_written_and_the_losses_have_the_same_bits(
    direction: str, k: int | None, dtype: torch.dtype, variant: str
) -> None:
    case = Case(2100, dtype, dtype, 2.0, k=k, rows=4, direction=direction)
    student, targets, labels = case.tensors()
    ce, kd, _ = kernel(case, student, targets, labels, variant)
    kept = student.clone()
    found = cpu.row_losses(student, targets, labels, case.settings, isa=variant)
    assert torch.equal(student, kept)
    assert torch.equal(found[0], ce)
    assert torch.equal(found[1], kd)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("k", [None, 20])
@pytest.mark.parametrize("shaped", [False, True])
def test_bits_of_a_row_are_its_own_in_every_direction(
    shaped: bool, k: int | None, direction: str, variant: str
) -> None:
    case = Case(70001, BF16, BF16, 2.0, k=k, rows=12, direction=direction, bias=shaped, padding=0 if k else 65)
    student, targets, labels = case.tensors()
    student[5, :40000] = -torch.inf  # one that the bf16 kernels decline
    first = kernel(case, student, targets, labels, variant)
    again = kernel(case, student, targets, labels, variant, threads=3)
    half = slice(4, 9)
    if isinstance(targets, DenseTargets):
        part: Targets = DenseTargets(targets.logits[half])
    else:
        part = TopKTargets(targets.ids[half], targets.logprobs[half], targets.tail[half])
    alone = kernel(case, student[half], part, labels[half], variant)
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
        assert torch.equal(a[half].nan_to_num(9.0), c.nan_to_num(9.0))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_vocabulary_of_262144_is_right(dtype: torch.dtype, variant: str) -> None:
    for k in (None, 128):
        result = compare(Case(262144, dtype, dtype, 2.0, k=k, rows=3, padding=0 if k else 100), isa=variant)
        assert result.passed, result


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_rows_and_no_valid_rows_give_zeros(direction: str, variant: str) -> None:
    for k in (None, 3):
        case = Case(77, BF16, BF16, 2.0, k=k, rows=4, direction=direction)
        student, targets, labels = case.tensors()
        student[1] = torch.nan
        for found in kernel(case, student, targets, torch.full_like(labels, -100), variant):
            assert (found == 0).all()
        nothing, none, empty = replace(case, rows=0).tensors()
        assert [len(found) for found in kernel(case, nothing, none, empty, variant)] == [0, 0, 0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_reverse_kl_of_what_the_teacher_excludes_is_infinite_and_has_no_gradient(variant: str) -> None:
    for dtype in (BF16, FP32):
        case = Case(1500, dtype, dtype, 2.0, rows=4, direction="reverse")
        student, targets, labels = case.tensors()
        assert isinstance(targets, DenseTargets)
        targets.logits[2, 1400] = -torch.inf
        ce, kd, gradient = kernel(case, student, targets, labels, variant)
        assert kd[2] == torch.inf
        assert ce[2].isfinite()
        assert gradient[2].isnan().all()
        assert gradient[[0, 1, 3]].isfinite().all()
        student[2, 1400] = -torch.inf  # both exclude it
        labels[2] = 3
        _, kd, gradient = kernel(case, student, targets, labels, variant)
        assert kd[2].isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cap_flattens_the_gradient_and_leaves_padding_alone(variant: str) -> None:
    case = Case(1100, FP32, FP32, 1.0, rows=3, padding=9, soft_cap=5.0)
    student, targets, labels = case.tensors()
    labels[:] = 4
    student[0, 4] = 200.0  # far in the flat part
    truth = exact(case, student, targets, labels)
    _, _, gradient = kernel(case, student, targets, labels, variant)
    assert truth.gradient is not None
    assert gradient[0, 4].abs() < 1e-6
    assert (gradient[:, -9:] == 0).all()
    assert torch.allclose(gradient.double(), truth.gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("k", [None, 7])
def test_a_row_has_the_same_bits_wherever_its_columns_lie(k: int | None, direction: str, variant: str) -> None:
    for dtype, shaping in ((BF16, {}), (FP32, {}), (BF16, {"bias": True}), (BF16, {"soft_cap": 20.0, "padding": 3})):
        case = Case(1043, dtype, dtype, 2.0, k=k, rows=5, direction=direction, **(shaping if k is None else {}))
        student, targets, labels = case.tensors()
        labels[1] = -100
        wanted = kernel(case, student, targets, labels, variant)
        for outer, inner in ((1043, 1), (1050, 1), (1, 9), (2 * 1043, 2)):
            memory = torch.full((5 * 2200,), 7.5, dtype=dtype)
            place = memory.as_strided((5, 1043), (outer, inner), 3)
            place.copy_(student)
            elsewhere = targets
            if isinstance(targets, DenseTargets):
                elsewhere = DenseTargets(targets.logits.new_empty(6 * 2200).as_strided((5, 1043), (outer, inner)))
                elsewhere.logits.copy_(targets.logits)
            ce, kd = cpu.row_losses(
                place, elsewhere, labels, case.settings, bias=case.bias_tensor(), write_gradient=True, isa=variant
            )
            assert torch.equal(ce, wanted[0])
            assert torch.equal(kd, wanted[1])
            assert torch.equal(place.nan_to_num(9.0), wanted[2].nan_to_num(9.0))
            place.fill_(7.5)
            assert (memory == 7.5).all()
