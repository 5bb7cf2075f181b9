"""The Triton kernels of the KD loss against the definition in fp64, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels import kd_divergence, kd_loss
from latentforge.kernels.parity.finding import disagreements, distance
from latentforge.kernels.parity.kd import Case, compare
from latentforge.kernels.parity.kd_grid import grid
from latentforge.kernels.reference import kd as reference
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets, topk_targets
from latentforge.kernels.triton import kd as triton
from latentforge.kernels.triton.configs import Config

BF16, FP32 = torch.bfloat16, torch.float32
INF, NAN = float("inf"), float("nan")
# Rows of a few hundred tokens are many blocks of this, as long ones are of the real tile.
SMALL = Config(128, 1)


def kernel(
    student: Tensor, targets: Targets | None, labels: Tensor | None, given: KDSettings, **own: Any
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = student.clone()
    ce, kd = triton.row_losses(gradient, targets, labels, given, write_gradient=True, **{"config": SMALL, **own})
    return ce, kd, gradient


def exact(
    student: Tensor, targets: Targets | None, labels: Tensor | None, given: KDSettings, bias: Tensor | None = None
) -> reference.RowLosses:
    if isinstance(targets, DenseTargets):
        targets = DenseTargets(targets.logits.double())
    return reference.row_losses(student.double(), targets, labels, given, bias=bias, gradient=True)


def cases(group: str) -> list[Case]:
    found = [case for name, case in grid(quick=True) if name == group and case.direction != "jsd"]
    if group not in ("edges", "mixed k"):  # whose rows differ
        found = [replace(case, rows=min(case.rows, 7 if group == "close pair" else 4)) for case in found]
    return found


GROUPS = sorted({name for name, case in grid(quick=True) if case.direction != "jsd"})


@pytest.mark.parametrize("group", GROUPS)
def test_every_case_of_the_parity_command_is_as_exact_as_torch(group: str) -> None:
    found = [compare(case, "triton") for case in cases(group)]
    assert found
    assert not [parity for parity in found if not parity.passed]


@st.composite
def drawn(draw: st.DrawFn) -> Case:
    vocab = draw(st.sampled_from([2, 3, 17, 127, 128, 129, 300]))
    k = draw(st.none() | st.integers(1, vocab))
    return Case(
        vocab=vocab,
        student_dtype=draw(st.sampled_from([BF16, FP32])),
        teacher_dtype=draw(st.sampled_from([BF16, FP32])),
        temperature=draw(st.sampled_from([1.0, 2.0, 4.0, 0.5, 1.7])),
        teacher_temperature=draw(st.sampled_from([None, 1.5])),
        direction=draw(st.sampled_from(["forward", "reverse"])),
        k=k,
        ce=draw(st.sampled_from([0.3, 0.0])),
        noise=draw(st.sampled_from([0.7, 0.02])),
        width=draw(st.sampled_from([1.0, 0.01, 30.0])),
        padding=0 if k else draw(st.integers(0, min(5, vocab - 2))),
        rows=4,
        bias=draw(st.booleans()),
        logit_scale=draw(st.sampled_from([1.0, 0.5])),
        soft_cap=draw(st.sampled_from([None, 20.0])),
        misaligned=draw(st.booleans()),
        edge=draw(st.sampled_from([None, "mixed k"])) if k else None,
    )


@settings(max_examples=30, derandomize=True)
@given(case=drawn())
def test_any_shape_type_temperature_direction_and_shaping_agrees_with_fp64(case: Case) -> None:
    # Rows this small leave torch's own error to chance: the yardstick is the precision itself.
    student, targets, labels = case.tensors()
    bias = case.bias_tensor()
    true = exact(student, targets, labels, case.settings, bias)
    assert true.gradient is not None
    vocab, stride = case.vocab, student.stride(0)
    storage = torch.full((case.rows * stride + 2,), 7.5, dtype=student.dtype)
    place = storage.as_strided((case.rows, vocab), (stride, 1), 1 if case.misaligned else 0)
    place.copy_(student)
    ce, kd = triton.row_losses(place, targets, labels, case.settings, bias=bias, write_gradient=True, config=SMALL)
    unit = torch.finfo(case.student_dtype).eps
    scale = case.settings.ce_scale + case.settings.kd_scale / case.temperature
    gap = (place.double() - true.gradient).abs()
    # Logits as wide as these have an error of their own in fp32, which the gradient inherits.
    width = float(student.float().abs().nan_to_num(0, 0, 0).max())
    assert bool((gap <= unit * true.gradient.abs() + (5e-7 + 2e-7 * width) * scale).all())
    assert float((ce.double() - true.ce).abs().max()) <= 1e-5 + 1e-6 * width
    assert float((kd.double() - true.kd).abs().max()) <= 1e-5 + 1e-6 * width
    place.fill_(7.5)
    assert bool((storage == 7.5).all()), "something was written outside the logits"


def test_a_tail_of_a_millionth_of_a_millionth_is_exact() -> None:
    # As 1 minus the top-k it would be nothing but rounding: the gradient outside would be wrong in every digit.
    student = torch.full((2, 300), -28.0)
    student[:, 40] = 3.0
    student[:, 41:50] = torch.linspace(-3, 2, 9)
    teacher = student.double() + torch.linspace(-0.5, 0.5, 300)
    targets = topk_targets(teacher, 10, 2.0)
    labels = torch.tensor([40, 120])
    for direction in ("forward", "reverse"):
        given = KDSettings(2.0, 2.0, kd_scale=1.0, direction=direction)
        true = exact(student, targets, labels, given)
        assert true.gradient is not None
        _, kd, gradient = kernel(student, targets, labels, given)
        outside = torch.ones(300, dtype=torch.bool)
        outside[targets.ids[0]] = False
        assert float(true.gradient[:, outside].abs().max()) < 1e-6
        assert distance(gradient[:, outside], true.gradient[:, outside]) < 1e-5
        assert float((kd - true.kd).abs().max()) < 1e-6


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("k", [None, 5])
def test_losses_alone_have_the_same_bits_and_write_nothing(direction: str, k: int | None) -> None:
    student, targets, labels = Case(321, BF16, BF16, 1.7, k=k, rows=4).tensors()
    given = KDSettings(1.7, 1.7, ce_scale=0.1, kd_scale=0.4, direction=direction)
    before = student.clone()
    ce, kd = triton.row_losses(student, targets, labels, given, config=SMALL)
    assert bool((student == before).all())
    with_gradient = kernel(student, targets, labels, given)
    assert torch.equal(ce, with_gradient[0])
    assert torch.equal(kd, with_gradient[1])


@pytest.mark.parametrize("k", [None, 7])
def test_the_bits_of_a_row_do_not_depend_on_the_other_rows(k: int | None) -> None:
    student, targets, labels = Case(200, BF16, FP32, 2.0, k=k, rows=5).tensors()
    given = KDSettings(2.0, 2.0, ce_scale=0.1, kd_scale=0.4)
    together = kernel(student, targets, labels, given)
    rows = slice(2, 4)
    part: Targets
    if isinstance(targets, TopKTargets):
        part = TopKTargets(targets.ids[rows], targets.logprobs[rows], targets.tail[rows])
    else:
        assert isinstance(targets, DenseTargets)
        part = DenseTargets(targets.logits[rows])
    for of_all, of_some in zip(together, kernel(student[rows], part, labels[rows], given), strict=True):
        assert torch.equal(of_all[rows], of_some)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_targets_are_left_alone_and_labels_may_be_missing(direction: str) -> None:
    student, targets, labels = Case(130, FP32, BF16, 2.0, rows=3).tensors()
    assert isinstance(targets, DenseTargets)
    before = targets.logits.clone()
    given = KDSettings(2.0, 2.0, kd_scale=0.5, direction=direction)
    true = exact(student, targets, None, given)
    assert true.gradient is not None
    ce, _, gradient = kernel(student, targets, None, given)
    assert torch.equal(targets.logits, before)
    assert bool((ce == 0).all())
    assert distance(gradient, true.gradient) < 1e-6
    alone = kernel(student, None, labels, KDSettings(1.0, 1.0, ce_scale=0.5))
    assert bool((alone[1] == 0).all())


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("k", [None, 4])
def test_what_one_side_excludes_costs_infinity_and_only_reverse_has_no_gradient(direction: str, k: int | None) -> None:
    student, targets, labels = Case(150, FP32, FP32, 2.0, rows=6, k=None).tensors()
    assert isinstance(targets, DenseTargets)
    teacher = targets.logits
    # -inf in the first block, in the last, at the label; on one side and on both; and far down on both.
    student[2, 5] = student[3, 149] = student[4, int(labels[4])] = -INF
    teacher[3, 20] = teacher[5, 140] = -INF
    student[5, 140] = -INF
    teacher[5, :100] -= 900.0
    student[5, 3] = -INF
    given = KDSettings(2.0, 2.0, ce_scale=0.1, kd_scale=0.4, direction=direction)
    chosen: Targets = targets if k is None else topk_targets(teacher, k, 2.0)
    # fp32 throughout: in fp64 a probability of e^-450 is more than nothing.
    true = reference.row_losses(student, chosen, labels, given, gradient=True)
    assert true.gradient is not None
    ce, kd, gradient = kernel(student, chosen, labels, given)
    assert disagreements(ce, true.ce) + disagreements(kd, true.kd) + disagreements(gradient, true.gradient) == 0
    assert distance(gradient, true.gradient) < 1e-5
    assert k is not None or bool(kd.isinf().any())


def test_the_public_call_takes_the_backend_by_name_in_the_interpreter() -> None:
    student, targets, labels = Case(130, FP32, FP32, 2.0, rows=4).tensors()
    found = {}
    for backend in ("reference", "triton"):
        leaf = student.clone().requires_grad_()
        shared: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.3, "kd_weight": 0.7, "denominator": 2.0}
        loss = kd_loss(leaf * 1, targets, labels, **shared, backend=backend).loss
        loss.backward()
        assert leaf.grad is not None
        found[backend] = (float(loss), leaf.grad, kd_divergence(student, targets, 2.0, backend=backend))
    assert found["triton"][0] == pytest.approx(found["reference"][0], rel=1e-6)
    assert distance(found["triton"][1], found["reference"][1]) < 1e-6
    assert distance(found["triton"][2], found["reference"][2]) < 1e-5


def test_jsd_and_other_precisions_are_refused_by_name() -> None:
    student, targets, labels = Case(130, FP32, FP32, 2.0, rows=4).tensors()
    with pytest.raises(RefusedError, match="'jsd'"):
        triton.row_losses(student, targets, labels, KDSettings(2.0, 2.0, direction="jsd"))
    with pytest.raises(RefusedError, match=r"torch\.float64"):
        triton.row_losses(student.double(), targets, labels, KDSettings(2.0, 2.0))
    with pytest.raises(RefusedError, match="column stride 2"):
        triton.row_losses(student[:, ::2], None, labels, KDSettings(2.0, 2.0))


def test_no_rows_are_no_work() -> None:
    ce, kd = triton.row_losses(torch.zeros(0, 7), None, None, KDSettings(1.0, 1.0), write_gradient=True)
    assert ce.shape == kd.shape == (0,)
