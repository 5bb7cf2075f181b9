"""Rows on which the C++ backend once gave a wrong number: temperatures far apart, excluded labels, extreme logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from latentforge.kernels.cpu import kd as cpu
from latentforge.kernels.native import native
from latentforge.kernels.reference import kd as reference
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets, topk_targets

VARIANTS = list(native().cpu_variants())
BF16, FP32 = torch.bfloat16, torch.float32


def both(
    student: Tensor, targets: Targets, labels: Tensor, settings: KDSettings, variant: str
) -> tuple[tuple[Tensor, Tensor, Tensor], reference.RowLosses]:
    """What the kernel finds, (ce, kd, gradient), and the definition in fp64."""
    gradient = student.clone()
    ce, kd = cpu.row_losses(gradient, targets, labels, settings, write_gradient=True, isa=variant)
    wide = DenseTargets(targets.logits.double()) if isinstance(targets, DenseTargets) else targets
    return (ce, kd, gradient), reference.row_losses(student.double(), wide, labels, settings, gradient=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(
    ("temperature", "scale", "spread"), [(4.0, 1.0, 12.0), (100.0, 2.5, 0.0), (0.01, 1.0, 0.01), (0.5, 1.0, 3.0)]
)
def test_the_mass_outside_the_top_k_is_right_however_far_the_temperatures_are_apart(
    temperature: float, scale: float, spread: float, dtype: torch.dtype, variant: str
) -> None:
    generator = torch.Generator().manual_seed(5)
    student = torch.randn(3, 333, generator=generator) * spread
    student[:, :300] += 60.0 * (temperature == 4.0)  # what is outside weighs next to nothing
    targets = topk_targets(student + 0.1 * torch.randn(3, 333, generator=generator), 300, temperature)
    settings = KDSettings(temperature, temperature, 0.3, 0.7 * temperature**2, logit_scale=scale)
    labels = torch.tensor([0, 5, 320])
    (ce, kd, gradient), exact = both(student.to(dtype), targets, labels, settings, variant)
    torch.testing.assert_close(kd, exact.kd, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ce, exact.ce, rtol=1e-5, atol=3e-6)
    assert exact.gradient is not None
    rounding = (exact.gradient.to(dtype).double() - exact.gradient).norm()
    assert (gradient.double() - exact.gradient).norm() <= 1.01 * rounding + 2e-6 * exact.gradient.norm()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("k", [None, 4])
def test_a_divergence_without_weight_has_no_gradient_even_where_it_is_infinite(
    k: int | None, dtype: torch.dtype, variant: str
) -> None:
    teacher = torch.linspace(-3.0, 3.0, 40).repeat(2, 1)
    teacher[:, 3] = -math.inf
    targets = DenseTargets(teacher) if k is None else topk_targets(teacher, 4, 2.0)
    if isinstance(targets, TopKTargets):
        targets.tail.fill_(-math.inf)
    student = torch.linspace(2.0, -2.0, 40).repeat(2, 1).to(dtype)
    settings = KDSettings(2.0, 2.0, 1.0, 0.0, direction="reverse")
    (ce, kd, gradient), exact = both(student, targets, torch.tensor([1, 3]), settings, variant)
    assert bool(kd.isinf().all())
    assert exact.gradient is not None
    torch.testing.assert_close(ce, exact.ce, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact.gradient, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("direction", ["forward", "jsd"])
def test_an_excluded_label_beside_a_top_k_that_is_everything_is_infinite_with_a_finite_gradient(
    direction: str, dtype: torch.dtype, variant: str
) -> None:
    student = torch.full((1, 9), -math.inf, dtype=dtype)
    student[0, 2] = 1.0
    targets = topk_targets(student.float(), 1, 2.0)
    settings = KDSettings(2.0, 2.0, 0.3, 2.8, direction=direction)
    (ce, kd, gradient), exact = both(student, targets, torch.tensor([7]), settings, variant)
    assert float(ce[0]) == math.inf
    assert float(kd[0]) == pytest.approx(0.0, abs=1e-9)
    assert exact.gradient is not None
    torch.testing.assert_close(gradient.double(), exact.gradient, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_the_cross_entropy_of_huge_logits_does_not_drown_in_their_digits(
    k: int, dtype: torch.dtype, variant: str
) -> None:
    student = torch.tensor([[3e30, -2e30, 1e30, 2.9e30], [-1e30, -2e30, -4e30, -1.1e30]]).to(dtype)
    settings = KDSettings(3.7, 3.7, 0.3, 0.7)
    labels = student.argmax(-1)
    if k == 0:
        ce, _ = cpu.row_losses(student.clone(), None, labels, settings, isa=variant)
    else:
        ce, _ = cpu.row_losses(student.clone(), topk_targets(student, k, 3.7), labels, settings, isa=variant)
    assert ce.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_entries_too_small_to_be_mixed_cost_nothing_in_jsd(variant: str) -> None:
    # exp(-708) is just above the smallest normal double, a thousandth of it is not.
    student = torch.tensor([[0.0, -707.9, -3.0]])
    targets = TopKTargets(torch.tensor([[0, 1]]), torch.tensor([[0.0, -math.inf]]), torch.full((1,), -math.inf))
    settings = KDSettings(1.0, 1.0, 0.3, 0.7, direction="jsd", beta=0.999)
    (_, kd, gradient), exact = both(student, targets, torch.tensor([0]), settings, variant)
    torch.testing.assert_close(kd, exact.kd, rtol=1e-5, atol=1e-7)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_an_infinite_gap_that_a_later_block_leaves_without_probability_costs_nothing(
    direction: str, variant: str
) -> None:
    # The first blocks look likely until the row's real maximum is seen, in the last one.
    student, teacher = torch.zeros(1, 4096), torch.zeros(1, 4096)
    excluded, other = (student, teacher) if direction == "forward" else (teacher, student)
    other[0, :2048] = -9000.0
    excluded[0, 5] = -math.inf
    settings = KDSettings(1.0, 1.0, 0.3, 0.7, direction=direction)
    (_, kd, gradient), exact = both(student, DenseTargets(teacher), torch.tensor([3000]), settings, variant)
    torch.testing.assert_close(kd, exact.kd, rtol=1e-5, atol=1e-6)
    assert exact.gradient is not None
    torch.testing.assert_close(gradient.double(), exact.gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_close_pair_far_from_zero_has_its_divergence(variant: str) -> None:
    student = torch.tensor([[-1000.0, -1004.0, -1012.0]]).to(BF16)
    teacher = torch.tensor([[-20.0, -24.0, -32.5]]).to(BF16)
    (_, kd, _), exact = both(student, DenseTargets(teacher), torch.tensor([0]), KDSettings(1.0, 1.0, 0.3, 0.7), variant)
    torch.testing.assert_close(kd, exact.kd, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_of_reverse_kl_at_a_certain_label_is_nothing_however_far_the_teacher_is(variant: str) -> None:
    student = torch.tensor([[3e29, -2e30, 1e29], [7e5, 0.0, -7e5]])
    teacher = torch.tensor([[-1.1e30, 2.3e30, 0.0], [-3.3e5, 5.1e5, 0.0]])
    settings = KDSettings(2.0, 0.05, 0.3, 0.7, direction="reverse")
    (_, _, gradient), exact = both(student, DenseTargets(teacher), torch.tensor([0, 0]), settings, variant)
    assert exact.gradient is not None
    torch.testing.assert_close(gradient.double(), exact.gradient, rtol=1e-5, atol=1e-6)
