"""Padding of the vocabulary and rows without a loss reach the linear loss as they reach kd_loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latentforge.kernels import DenseTargets, LinearTargets, linear_kd_loss
from latentforge.kernels.targets import topk_targets

ROWS, VOCAB, REAL, WIDTH = 23, 90, 77, 8
CHUNKS = (1000, 40, 20, 3)  # one chunk, sums that are kept, two sweeps


def call(
    dtype: torch.dtype, kind: str, direction: str, chunk_rows: int | None, backend: str, *, student_pads: bool = True
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(VOCAB, generator=generator)
    of_teacher = torch.randn(VOCAB, generator=generator)
    of_teacher[REAL:] = -torch.inf
    if student_pads:
        bias[REAL:] = -torch.inf
    bias = bias.to(dtype).requires_grad_()
    teacher = LinearTargets(
        torch.randn(ROWS, 5, generator=generator), torch.randn(VOCAB, 5, generator=generator), of_teacher
    )
    logits = teacher.hidden @ teacher.weight.T + of_teacher
    targets: Any = {"linear": teacher, "dense": DenseTargets(logits), "topk": topk_targets(logits, 6, 2.0)}[kind]
    found = linear_kd_loss(
        hidden,
        weight,
        targets,
        torch.randint(0, REAL, (ROWS,), generator=generator),
        bias=bias,
        temperature=2.0,
        ce_weight=0.3,
        kd_weight=0.7,
        direction=direction,
        denominator=float(ROWS),
        soft_cap=20.0,
        chunk_rows=chunk_rows,
        backend=backend,
    )
    found.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    return [found.loss.detach(), hidden.grad, weight.grad, bias.grad]


@pytest.mark.parametrize("chunk_rows", CHUNKS)
@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("kind", ["linear", "dense", "topk"])
def test_padded_tokens_get_no_gradient_and_change_nothing(kind: str, direction: str, chunk_rows: int) -> None:
    exact = call(torch.float64, kind, direction, None, "reference")
    found = call(torch.float32, kind, direction, chunk_rows, "cpu")
    for a, b in zip(found, exact, strict=True):
        assert b.isfinite().all()
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-6)
    for gradient in found[2:]:
        assert (gradient[REAL:] == 0).all()


@pytest.mark.parametrize("chunk_rows", CHUNKS)
@pytest.mark.parametrize("kind", ["linear", "dense"])
def test_what_only_the_teacher_excludes_is_infinite_in_reverse_and_harmless_forward(kind: str, chunk_rows: int) -> None:
    forward = call(torch.float32, kind, "forward", chunk_rows, "cpu", student_pads=False)
    exact = call(torch.float64, kind, "forward", None, "reference", student_pads=False)
    for a, b in zip(forward, exact, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-6)
    loss, *gradients = call(torch.float32, kind, "reverse", chunk_rows, "cpu", student_pads=False)
    assert loss == torch.inf
    assert all(gradient.isnan().any() for gradient in gradients)


@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_one_row_that_is_no_number_is_seen_in_the_loss_and_in_its_own_gradient(chunk_rows: int) -> None:
    hidden = torch.randn(ROWS, WIDTH)
    hidden[4] = torch.nan
    hidden.requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
    targets = DenseTargets(torch.randn(ROWS, VOCAB))
    found = linear_kd_loss(
        hidden,
        weight,
        targets,
        torch.zeros(ROWS, dtype=torch.int64),
        temperature=1.0,
        ce_weight=0.5,
        kd_weight=0.5,
        denominator=1.0,
        chunk_rows=chunk_rows,
        backend="cpu",
    )
    found.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert found.loss.isnan()
    assert hidden.grad.isnan().all(-1).nonzero().flatten().tolist() == [4]
    assert weight.grad.isnan().all()
