"""The C++ backend against the definition in fp64, in every variant that this machine can run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentforge.kernels.cpu import kd as cpu
from latentforge.kernels.cpu.variants import VARIANT_VARIABLE
from latentforge.kernels.cpu.variants import variant as chosen_variant
from latentforge.kernels.native import native
from latentforge.kernels.parity.kd import Case, compare
from latentforge.kernels.reference import kd as reference
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets, topk_targets

VARIANTS = list(native().cpu_variants())
BF16, FP32 = torch.bfloat16, torch.float32
INF = float("inf")


def scales(temperature: float, rows: int, ce: float = 0.3, kd: float = 0.7) -> dict[str, Any]:
    return {
        "temperature": temperature,
        "teacher_temperature": temperature,
        "ce_scale": ce / max(rows, 1),
        "kd_scale": kd * temperature**2 / max(rows, 1),
    }


def exact(student: Tensor, targets: Targets | None, labels: Tensor | None, **given: Any) -> reference.RowLosses:
    if isinstance(targets, DenseTargets):
        targets = DenseTargets(targets.logits.double())
    return reference.row_losses(student.double(), targets, labels, KDSettings(**given), gradient=True)


def kernel(
    student: Tensor,
    targets: Targets | None,
    labels: Tensor | None,
    *,
    isa: str | None = None,
    threads: int | None = None,
    **given: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = student.clone()
    ce, kd = cpu.row_losses(
        gradient, targets, labels, KDSettings(**given), write_gradient=True, isa=isa, threads=threads
    )
    return ce, kd, gradient


@st.composite
def cases(draw: st.DrawFn) -> Case:
    vocab = draw(st.sampled_from([2, 3, 7, 15, 16, 17, 31, 32, 33, 64, 127, 1023, 1024, 1025, 2080, 3001]))
    k = draw(st.none() | st.integers(1, min(vocab - 1, 200)))
    return Case(
        vocab=vocab,
        student_dtype=draw(st.sampled_from([BF16, FP32])),
        teacher_dtype=draw(st.sampled_from([BF16, FP32])),
        temperature=draw(st.sampled_from([1.0, 2.0, 4.0, 0.5, 1.7])),
        k=k,
        noise=draw(st.sampled_from([0.7, 0.02])),
        width=draw(st.sampled_from([1.0, 0.01, 30.0])),
        padding=0 if k else draw(st.integers(0, min(5, vocab - 2))),
        rows=draw(st.integers(3, 6)),
        edge=draw(st.sampled_from([None, "mixed k"])) if k else None,
    )


@settings(max_examples=400, derandomize=True)
@given(case=cases(), variant=st.sampled_from(VARIANTS))
def test_any_shape_type_temperature_and_width_agrees_with_fp64(case: Case, variant: str) -> None:
    # Rows this small leave torch's own error to chance: the yardstick is the precision itself.
    student, targets, labels = case.tensors()
    given = scales(case.temperature, case.rows)
    truth = exact(student, targets, labels, **given)
    ce, kd, gradient = kernel(student, targets, labels, isa=variant, **given)
    assert truth.gradient is not None
    # Entries are differences of probabilities (at most 1) times weights: that is the size errors are measured by.
    size = given["ce_scale"] + given["kd_scale"] / case.temperature
    precision = 2**-8 * truth.gradient.abs() if case.student_dtype == BF16 else 2**-21 * truth.gradient.abs()
    assert ((gradient.double() - truth.gradient).abs() <= precision + 6e-6 * size).all()
    reach = 1.0 + float(student.double().nan_to_num(neginf=0.0).abs().max()) / case.temperature
    assert torch.allclose(ce, truth.ce, rtol=1e-6, atol=8e-6 + 1e-7 * reach)
    assert torch.allclose(kd, truth.kd, rtol=1e-5, atol=8e-6 + 4e-7 * reach)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("vocab", [50257, 128256])
def test_error_is_not_worse_than_torchs_at_the_same_precision(
    vocab: int, dtype: torch.dtype, temperature: float, variant: str
) -> None:
    for k in (None, 64):
        result = compare(Case(vocab, dtype, dtype, temperature, k=k, rows=4), isa=variant)
        assert result.passed, result


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_widest_vocabulary_of_the_field_is_right_in_bf16(variant: str) -> None:
    for vocab in (151936, 152064):
        result = compare(Case(vocab, BF16, BF16, 2.0, rows=4, padding=271), isa=variant)
        assert result.passed, result


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("kind", ["dense", "topk"])
def test_bits_do_not_depend_on_threads_or_on_the_rest_of_the_batch(kind: str, dtype: torch.dtype, variant: str) -> None:
    case = Case(70001, dtype, dtype, 3.0, k=20 if kind == "topk" else None, rows=24)
    student, targets, labels = case.tensors()
    given = scales(3.0, case.rows)
    first = kernel(student, targets, labels, isa=variant, threads=1, **given)
    for threads in (2, 3, 7):
        again = kernel(student, targets, labels, isa=variant, threads=threads, **given)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    half = slice(12, 24)
    if isinstance(targets, DenseTargets):
        part: Targets = DenseTargets(targets.logits[half])
    else:
        part = TopKTargets(targets.ids[half], targets.logprobs[half], targets.tail[half])
    alone = kernel(student[half], part, labels[half], isa=variant, **given)
    assert all(torch.equal(a[half], b) for a, b in zip(first, alone, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("position", [0, 500, 1030, 2050])
def test_a_nan_anywhere_makes_its_row_nan_and_no_other(
    position: int, side: str, dtype: torch.dtype, variant: str
) -> None:
    for bits in (float("nan"), -float("nan")):
        student, targets, labels = Case(2051, dtype, dtype, 2.0, rows=4).tensors()
        assert isinstance(targets, DenseTargets)
        (student if side == "student" else targets.logits)[2, position] = bits
        ce, kd, gradient = kernel(student, targets, labels, isa=variant, **scales(2.0, 4))
        assert ce[2].isnan()
        assert kd[2].isnan()
        assert gradient[2].isnan().all()
        others = [0, 1, 3]
        assert ce[others].isfinite().all()
        assert kd[others].isfinite().all()
        assert gradient[others].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("place", ["inside the top-k", "outside", "log-probability", "tail"])
def test_a_nan_in_a_topk_row_makes_it_nan(place: str, variant: str) -> None:
    student, targets, labels = Case(1500, FP32, FP32, 1.0, k=9, rows=4).tensors()
    assert isinstance(targets, TopKTargets)
    if place == "inside the top-k":
        student[2, targets.ids[2, 3]] = torch.nan
    elif place == "outside":
        student[2, next(i for i in range(1500) if i not in targets.ids[2])] = torch.nan
    elif place == "log-probability":
        targets.logprobs[2, 1] = torch.nan
    else:
        targets.tail[2] = torch.nan
    ce, kd, gradient = kernel(student, targets, labels, isa=variant, **scales(1.0, 4))
    assert kd[2].isnan()
    assert gradient[2].isnan().all()
    assert gradient[[0, 1, 3]].isfinite().all()
    assert ce[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_row_without_a_distribution_is_nan(side: str, value: float, variant: str) -> None:
    student, targets, labels = Case(1100, FP32, FP32, 1.0, rows=4).tensors()
    assert isinstance(targets, DenseTargets)
    (student if side == "student" else targets.logits)[2] = value
    _, kd, gradient = kernel(student, targets, labels, isa=variant, **scales(1.0, 4))
    assert kd[2].isnan()
    assert gradient[2].isnan().all()
    assert kd[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_tokens_excluded_by_the_teacher_cost_nothing_and_pull_only_downwards(
    temperature: float, dtype: torch.dtype, variant: str
) -> None:
    student, targets, labels = Case(2100, dtype, dtype, temperature, rows=4).tensors()
    assert isinstance(targets, DenseTargets)
    targets.logits[:, 40:1500] = -INF
    labels.fill_(3)
    given = scales(temperature, 4)
    truth = exact(student, targets, labels, **given)
    ce, kd, gradient = kernel(student, targets, labels, isa=variant, **given)
    assert torch.allclose(kd, truth.kd, atol=1e-4)
    assert torch.allclose(ce, truth.ce, atol=1e-4)
    assert (gradient[:, 40:1500] >= 0).all()
    assert truth.gradient is not None
    assert float((gradient.double() - truth.gradient).norm() / truth.gradient.norm()) < 5e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_mass_that_the_student_excludes_is_infinite_loss_and_a_finite_gradient(variant: str) -> None:
    for targets_k in (None, 5):
        student, targets, labels = Case(2100, FP32, FP32, 1.0, k=targets_k, rows=4).tensors()
        student[3] = -INF
        student[3, :7] = torch.arange(7.0)
        labels.fill_(2)
        given = scales(1.0, 4)
        truth = exact(student, targets, labels, **given)
        ce, kd, gradient = kernel(student, targets, labels, isa=variant, **given)
        assert kd[3] == INF
        assert truth.kd[3] == INF
        assert ce[3].isfinite()
        assert gradient.isfinite().all()
        assert truth.gradient is not None
        assert torch.allclose(gradient[3].double(), truth.gradient[3], atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rows_whose_maximum_comes_late_and_high_are_right(dtype: torch.dtype, variant: str) -> None:
    # The reference is guessed from the first block: here it is wrong by thousands, upwards, in several places.
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(5, 5000, generator=generator)
    teacher = torch.randn(5, 5000, generator=generator)
    student[0, 4999], teacher[0, 4999] = 900.0, 850.0
    student[1, 1500], student[1, 3000], teacher[1, 3000] = 100.0, 5000.0, 4000.0
    student[2, :1024], teacher[2, :2048] = -INF, -INF
    student[3] -= 30000.0
    teacher[4, :1024] = -3000.0
    student, teacher = student.to(dtype), teacher.to(dtype)
    labels = torch.tensor([4999, 3000, 4000, 17, 2000])
    for temperature in (1.0, 2.0, 0.3):
        given = scales(temperature, 5)
        for targets in (DenseTargets(teacher), topk_targets(teacher[:, :].float().clamp_min(-1e30), 50, temperature)):
            truth = exact(student, targets, labels, **given)
            ce, kd, gradient = kernel(student, targets, labels, isa=variant, **given)
            assert torch.allclose(ce, truth.ce, rtol=1e-5, atol=1e-5)
            assert torch.allclose(kd, truth.kd, rtol=1e-5, atol=2e-3)
            assert truth.gradient is not None
            assert float((gradient.double() - truth.gradient).norm() / truth.gradient.norm()) < 4e-3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("height", [1e3, 1e5, 1e8, 1e12, 1e30])
def test_one_logit_far_above_all_others_is_the_whole_distribution(height: float, variant: str) -> None:
    for dtype in (BF16, FP32):
        student, teacher = torch.randn(2, 4100).to(dtype), torch.randn(2, 4100).to(dtype)
        student[:, 3000], teacher[:, 3000] = height, height
        labels = torch.tensor([3000, 4099])
        for targets in (DenseTargets(teacher), topk_targets(teacher, 3, 2.0)):
            ce, kd, gradient = kernel(student, targets, labels, isa=variant, **scales(2.0, 2))
            assert abs(float(ce[0])) < 1e-5 + 1e-15 * height
            assert ce[1] == pytest.approx(float(student[1, 3000].double() - student[1, 4099].double()), rel=1e-6)
            assert kd.abs().max() < 1e-5
            assert gradient[0].abs().max() < 1e-5
            assert float(gradient[1, 3000]) == pytest.approx(0.15, rel=1e-2)
            assert float(gradient[1, 4099]) == pytest.approx(-0.15, rel=1e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_masks_made_of_the_lowest_finite_number_behave_like_infinity(variant: str) -> None:
    for dtype in (BF16, FP32):
        student, targets, labels = Case(1100, dtype, dtype, 2.0, rows=4).tensors()
        assert isinstance(targets, DenseTargets)
        student[:, 900:], targets.logits[:, 900:] = torch.finfo(dtype).min, torch.finfo(dtype).min
        labels.fill_(5)
        ce, kd, gradient = kernel(student, targets, labels, isa=variant, **scales(2.0, 4))
        student[:, 900:], targets.logits[:, 900:] = -INF, -INF
        masked = kernel(student, targets, labels, isa=variant, **scales(2.0, 4))
        assert torch.allclose(ce, masked[0])
        assert torch.allclose(kd, masked[1], atol=1e-6)
        assert torch.equal(gradient, masked[2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_topk_of_the_whole_vocabulary_is_the_dense_teacher(variant: str) -> None:
    student, dense, labels = Case(300, FP32, FP32, 2.0, rows=4).tensors()
    assert isinstance(dense, DenseTargets)
    whole = topk_targets(dense.logits, 300, 2.0)
    assert (whole.tail == -INF).all()
    given = scales(2.0, 4)
    _, kd, gradient = kernel(student, whole, labels, isa=variant, **given)
    _, kd_dense, gradient_dense = kernel(student, dense, labels, isa=variant, **given)
    assert torch.allclose(kd, kd_dense, atol=1e-5)
    assert torch.allclose(gradient, gradient_dense, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tail_is_a_sum_and_not_a_difference(variant: str) -> None:
    # One part in 1e12 outside the top-k: 1 - sum(top-k) in fp32 would be rounding noise or zero.
    student = torch.full((1, 4000), -30.0)
    student[0, :4] = torch.tensor([8.0, 7.0, 6.0, 5.0])
    teacher = torch.full((1, 4000), -25.0)
    teacher[0, :4] = torch.tensor([7.0, 8.0, 6.0, 5.0])
    targets, labels, given = topk_targets(teacher, 4, 1.0), torch.tensor([1]), scales(1.0, 1)
    truth = exact(student, targets, labels, **given)
    _, kd, gradient = kernel(student, targets, labels, isa=variant, **given)
    assert truth.gradient is not None
    assert torch.allclose(kd, truth.kd, rtol=1e-6)
    assert torch.allclose(gradient.double(), truth.gradient, rtol=1e-4, atol=1e-20)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ignored_rows_count_nothing_even_with_nan_in_them(variant: str) -> None:
    student, targets, labels = Case(90, BF16, BF16, 1.0, rows=5).tensors()
    student[0] = torch.nan
    ce, kd, gradient = kernel(student, targets, labels, isa=variant, **scales(1.0, 5))
    assert (ce[:2] == 0).all()
    assert (kd[:2] == 0).all()
    assert (gradient[:2] == 0).all()
    assert gradient[2:].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_further_apart_than_they_are_wide_are_read_in_place(variant: str) -> None:
    wide = torch.randn(4, 150).to(BF16)
    student, labels, given = torch.randn(4, 101).to(BF16), torch.tensor([0, 1, 2, 3]), scales(2.0, 4)
    from_view = kernel(student, DenseTargets(wide[:, :101]), labels, isa=variant, **given)
    copied = kernel(student, DenseTargets(wide[:, :101].contiguous()), labels, isa=variant, **given)
    assert all(torch.equal(a, b) for a, b in zip(from_view, copied, strict=True))


def test_nothing_around_the_logits_is_written() -> None:
    for variant in VARIANTS:
        for dtype in (BF16, FP32):
            around = torch.full((5, 77), 9.0, dtype=dtype)
            inner = around[1:4]
            inner.copy_(torch.randn(3, 77))
            teacher = torch.randn(3, 77).to(dtype)
            kept = teacher.clone()
            cpu.row_losses(
                inner,
                DenseTargets(teacher),
                torch.tensor([1, 2, 3]),
                KDSettings(**scales(2.0, 3)),
                write_gradient=True,
                isa=variant,
            )
            assert (around[0] == 9).all()
            assert (around[4] == 9).all()
            assert torch.equal(teacher, kept)


def test_a_variant_that_the_machine_lacks_is_refused() -> None:
    student, targets, labels = Case(33, FP32, FP32, 1.0, rows=3).tensors()
    with pytest.raises(ValueError, match="mmx"):
        kernel(student, targets, labels, isa="mmx", **scales(1.0, 3))


def test_the_variant_named_in_the_environment_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from latentforge.errors import RefusedError

    monkeypatch.setenv(VARIANT_VARIABLE, "baseline")
    assert chosen_variant() == "baseline"
    monkeypatch.setenv(VARIANT_VARIABLE, "mmx")
    with pytest.raises(RefusedError, match="mmx"):
        chosen_variant()


def test_a_forked_child_can_use_the_kernel() -> None:
    import os

    student, targets, labels = Case(50000, FP32, FP32, 1.0, rows=16).tensors()
    kernel(student, targets, labels, threads=2, **scales(1.0, 16))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # torch's own OpenMP pool does not outlive a fork; the kernel has no such pool
            kernel(student, targets, labels, threads=2, **scales(1.0, 16))
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
