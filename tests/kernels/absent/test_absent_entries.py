"""Rows of a top-k may have fewer than k entries: those missing at a row's end count to the tokens outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels import kd_divergence, kd_loss, linear_kd_loss
from latentforge.kernels.cpu import kd as cpu
from latentforge.kernels.indices import check_indices
from latentforge.kernels.native import native
from latentforge.kernels.parity.kd import Case, mixed_counts
from latentforge.kernels.reference import kd as reference
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, TopKTargets, cut_rows, topk_targets

VARIANTS = list(native().cpu_variants())
BF16, FP32 = torch.bfloat16, torch.float32
INF = float("inf")
DIRECTIONS = ("forward", "reverse", "jsd")


def padded(targets: TopKTargets, k: int) -> TopKTargets:
    rows, more = len(targets.ids), k - targets.ids.shape[1]
    ids = torch.cat([targets.ids, torch.full((rows, more), -1, dtype=targets.ids.dtype)], dim=1)
    logprobs = torch.cat([targets.logprobs, torch.full((rows, more), -INF)], dim=1)
    return TopKTargets(ids, logprobs, targets.tail)


def rows_of(targets: TopKTargets, rows: slice, k: int | None = None) -> TopKTargets:
    return TopKTargets(targets.ids[rows, :k], targets.logprobs[rows, :k], targets.tail[rows])


def on_cpu(
    student: Tensor, targets: TopKTargets, labels: Tensor, asked: KDSettings, isa: str, threads: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = student.clone()
    ce, kd = cpu.row_losses(gradient, targets, labels, asked, write_gradient=True, isa=isa, threads=threads)
    return ce, kd, gradient


@settings(max_examples=60, derandomize=True)
@given(
    variant=st.sampled_from(VARIANTS),
    dtype=st.sampled_from([BF16, FP32]),
    direction=st.sampled_from(DIRECTIONS),
    temperature=st.sampled_from([1.0, 2.0, 1.7]),
    k=st.integers(1, 40),
    more=st.integers(1, 40),
    vocab=st.sampled_from([81, 1024, 2085, 5003]),
)
def test_a_row_padded_with_absent_entries_has_the_bits_of_the_row_without_them(
    variant: str, dtype: torch.dtype, direction: str, temperature: float, k: int, more: int, vocab: int
) -> None:
    student, targets, labels = Case(vocab, dtype, dtype, temperature, k=k, rows=4).tensors()
    assert isinstance(targets, TopKTargets)
    labels[3] = targets.ids[3, 0]
    asked = KDSettings(temperature, temperature, ce_scale=0.1, kd_scale=0.4, direction=direction, beta=0.3)
    alone = on_cpu(student, targets, labels, asked, variant)
    more_entries = on_cpu(student, padded(targets, k + more), labels, asked, variant)
    assert all(torch.equal(a, b) for a, b in zip(alone, more_entries, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rows_of_different_k_in_one_batch_have_the_bits_of_each_alone(dtype: torch.dtype, variant: str) -> None:
    rows, k = 14, 20
    student, targets, labels = Case(70001, dtype, dtype, 3.0, k=k, rows=rows, edge="mixed k").tensors()
    assert isinstance(targets, TopKTargets)
    asked = KDSettings(3.0, 3.0, ce_scale=0.1, kd_scale=0.4)
    together = on_cpu(student, targets, labels, asked, variant, 1)
    for threads in (2, 5):
        again = on_cpu(student, targets, labels, asked, variant, threads)
        assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    for row, count in enumerate(mixed_counts(rows, k).tolist()):
        one = slice(row, row + 1)
        alone = on_cpu(student[one], rows_of(targets, one, max(count, 1)), labels[one], asked, variant)
        assert all(torch.equal(a[one], b) for a, b in zip(together, alone, strict=True)), (row, count)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_where_the_teacher_says_nothing_the_divergence_and_its_gradient_are_zero(backend: str, direction: str) -> None:
    student = torch.randn(5, 900, generator=torch.Generator().manual_seed(1)) * 5
    targets = TopKTargets(torch.full((5, 3), -1), torch.full((5, 3), -INF), torch.tensor([0.0, 0.0, 0.0, -3.0, 2.0]))
    labels = torch.randint(0, 900, (5,), generator=torch.Generator().manual_seed(2))
    asked: dict[str, Any] = {"temperature": 2.0, "denominator": 5.0, "direction": direction, "backend": backend}
    leaf = student.clone().requires_grad_()
    # A tail of any size is the whole, where nothing else is there.
    found = kd_loss(leaf * 1, targets, labels, ce_weight=0.0, kd_weight=1.0, **asked)
    found.loss.backward()
    rounding = 0.0 if backend == "cpu" else 1e-6
    assert abs(float(found.kd)) <= rounding
    assert leaf.grad is not None
    assert float(leaf.grad.abs().max()) <= rounding
    with_ce, without = student.clone().requires_grad_(), student.clone().requires_grad_()
    kd_loss(with_ce * 1, targets, labels, ce_weight=0.3, kd_weight=0.7, **asked).loss.backward()
    kd_loss(without * 1, None, labels, ce_weight=0.3, kd_weight=0.0, **asked).loss.backward()
    assert with_ce.grad is not None
    assert without.grad is not None
    assert torch.allclose(with_ce.grad, without.grad, rtol=0, atol=1e-7)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_definition_counts_what_is_absent_to_the_tokens_outside(direction: str) -> None:
    # Token 0 too, whose place an absent id could be taken for.
    generator = torch.Generator().manual_seed(4)
    student = torch.randn(6, 40, generator=generator, dtype=torch.float64) * 2
    teacher = torch.randn(6, 40, generator=generator, dtype=torch.float64) * 2
    teacher[::2, 0] += 9.0
    asked = KDSettings(1.5, 1.5, ce_scale=0.2, kd_scale=0.9, direction=direction, beta=0.3)
    targets = cut_rows(topk_targets(teacher, 8, 1.5), torch.tensor([8, 3, 1, 5, 2, 7]), 1.5)
    labels = torch.tensor([0, 1, 0, 3, 39, 5])
    found = reference.row_losses(student, targets, labels, asked, gradient=True)
    assert found.gradient is not None
    for row, count in enumerate([8, 3, 1, 5, 2, 7]):
        one = slice(row, row + 1)
        alone = reference.row_losses(student[one], rows_of(targets, one, count), labels[one], asked, gradient=True)
        assert alone.gradient is not None
        assert torch.allclose(found.kd[one], alone.kd, rtol=1e-14, atol=1e-15)
        assert torch.allclose(found.gradient[one], alone.gradient, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_linear_kd_loss_takes_rows_of_different_k(chunk_rows: int | None) -> None:
    generator = torch.Generator().manual_seed(6)
    hidden, weight = torch.randn(14, 24, generator=generator), torch.randn(301, 24, generator=generator)
    targets = cut_rows(topk_targets(torch.randn(14, 301, generator=generator) * 3, 9, 2.0), mixed_counts(14, 9), 2.0)
    labels = torch.randint(0, 301, (14,), generator=generator)
    asked: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.3, "kd_weight": 0.7, "denominator": 14.0}
    before = targets.ids.clone()
    found = {}
    for backend, dtype in (("cpu", FP32), ("reference", torch.float64)):
        h, w = hidden.to(dtype, copy=True).requires_grad_(), weight.to(dtype, copy=True).requires_grad_()
        loss = linear_kd_loss(h, w, targets, labels, chunk_rows=chunk_rows, backend=backend, **asked).loss
        loss.backward()
        assert h.grad is not None
        assert w.grad is not None
        found[backend] = (loss.detach().double(), h.grad.double(), w.grad.double())
    for ours, exact in zip(*found.values(), strict=True):
        assert torch.allclose(ours, exact, rtol=1e-5, atol=1e-7)
    assert torch.equal(targets.ids, before), "the caller's ids were written"


WRONG = {
    "but has a logprob": lambda ids, logprobs, tail: logprobs.__setitem__((2, 4), -3.0),
    "column 4 is absent .* but has a logprob": lambda ids, logprobs, tail: logprobs.__setitem__((2, 4), torch.nan),
    "row 2, column 1 is absent .* a later one of its row is not": lambda ids, logprobs, tail: (
        ids.__setitem__((2, 1), -1),
        logprobs.__setitem__((2, 1), -INF),
    ),
    "top-k id -2 at row 2": lambda ids, logprobs, tail: ids.__setitem__((2, 4), -2),
    "row 3 are absent.* the teacher says nothing": lambda ids, logprobs, tail: (
        ids.__setitem__(3, -1),
        logprobs.__setitem__(3, -INF),
        tail.__setitem__(3, -INF),
    ),
    "given twice at row 2": lambda ids, logprobs, tail: ids.__setitem__((2, 1), ids[2, 0].item()),
}


@pytest.mark.parametrize("said", WRONG)
@pytest.mark.parametrize("call", ["cpu", "reference", "linear", "divergence"])
def test_what_is_no_row_with_absent_entries_is_refused_by_name_before_anything_is_written(call: str, said: str) -> None:
    student, targets, labels = Case(200, FP32, FP32, 1.0, k=5, rows=6).tensors()
    assert isinstance(targets, TopKTargets)
    targets = cut_rows(targets, torch.tensor([5, 5, 3, 5, 0, 5]), 1.0)
    asked: dict[str, Any] = {"temperature": 1.0, "ce_weight": 0.3, "kd_weight": 0.7, "denominator": 6.0}
    # As it is it is taken.
    kd_loss(student, targets, labels, backend="cpu", **asked)
    WRONG[said](targets.ids, targets.logprobs, targets.tail)
    logits = student.clone().requires_grad_() * 1
    before = logits.detach().clone()
    calls = {
        "cpu": lambda: kd_loss(logits, targets, labels, backend="cpu", **asked),
        "reference": lambda: kd_loss(logits, targets, labels, backend="reference", **asked),
        "linear": lambda: linear_kd_loss(torch.eye(6), student.T.contiguous(), targets, labels, **asked),
        "divergence": lambda: kd_divergence(logits.detach(), targets, 1.0, backend="cpu"),
    }
    with pytest.raises(RefusedError, match=said):
        calls[call]()
    assert torch.equal(logits.detach(), before)


def test_a_row_that_does_not_count_may_say_nothing_at_all() -> None:
    student, targets, labels = Case(200, FP32, FP32, 1.0, k=5, rows=4).tensors()
    assert isinstance(targets, TopKTargets)
    targets.ids[0], targets.logprobs[0], targets.tail[0] = -1, -INF, -INF
    assert int(labels[0]) == -100
    for backend in ("cpu", "reference"):
        found = kd_loss(
            student, targets, labels, temperature=1.0, ce_weight=0.3, kd_weight=0.7, denominator=2.0, backend=backend
        )
        assert bool(found.loss.isfinite())


def test_a_tail_is_refused_only_where_a_row_names_the_whole_vocabulary() -> None:
    teacher = torch.randn(3, 6, generator=torch.Generator().manual_seed(8))
    whole = topk_targets(teacher, 6, 1.0)
    cut = cut_rows(whole, torch.tensor([6, 4, 0]), 1.0)
    labels = torch.tensor([0, 1, 2])
    asked: dict[str, Any] = {"temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0, "denominator": 3.0}
    assert bool(kd_loss(teacher.clone(), cut, labels, backend="cpu", **asked).loss.isfinite())
    cut.tail[0] = -4.0
    with pytest.raises(RefusedError, match="at row 0, but k = 6 is the whole vocabulary"):
        kd_loss(teacher.clone(), cut, labels, backend="cpu", **asked)


@settings(max_examples=150, derandomize=True)
@given(data=st.data())
def test_both_searches_agree_on_which_rows_are_wrong(data: st.DataObject) -> None:
    rows, k, vocab = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), 6
    ids = torch.tensor(data.draw(st.lists(st.lists(st.integers(-2, vocab), min_size=k, max_size=k), min_size=rows,
                                          max_size=rows)))  # fmt: skip
    logprobs = torch.tensor(data.draw(st.lists(st.lists(st.sampled_from([-INF, -1.0]), min_size=k, max_size=k),
                                               min_size=rows, max_size=rows)))  # fmt: skip
    tail = torch.tensor(data.draw(st.lists(st.sampled_from([-INF, 0.0]), min_size=rows, max_size=rows)))
    labels = torch.tensor(data.draw(st.lists(st.sampled_from([-100, 2]), min_size=rows, max_size=rows)))
    targets, student = TopKTargets(ids, logprobs, tail), torch.zeros(rows, vocab)
    refused = []
    for search in (
        lambda: check_indices(targets, labels, vocab, -100),
        lambda: cpu.row_losses(student, targets, labels, KDSettings(1.0, 1.0)),
    ):
        try:
            search()
            refused.append(False)
        except RefusedError:
            refused.append(True)
    assert refused[0] == refused[1]


def test_dense_targets_have_nothing_absent() -> None:
    check_indices(DenseTargets(torch.zeros(2, 3)), torch.tensor([0, 1]), 3, -100)
