"""Small inputs for the checks, and the loss and gradient as a caller of the public functions gets them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentforge.kernels.api import kd_loss
from latentforge.kernels.targets import Targets

TEMPERATURES = (1.0, 2.0, 4.0)
WEIGHTS = ((0.3, 0.7), (0.7, 0.3), (1.0, 0.0), (0.0, 1.0), (0.5, 2.0))


def known_mutant(mutant: str | None, known: tuple[str, ...]) -> None:
    """A misspelt control must raise: left alone it would plant nothing."""
    if mutant is not None and mutant not in known:
        raise ValueError(f"mutant {mutant!r} is not one of {known}")


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal fp64 numbers of a standard deviation, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def labels_of(seed: int, rows: int, vocab: int) -> Tensor:
    """Labels [rows] int64, uniform over the vocabulary."""
    return torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(seed))


def gradient_of(student: Tensor, targets: Targets | None, labels: Tensor, **settings: Any) -> Tensor:
    """The gradient of ``kd_loss`` over the logits [N, V], as autograd receives it; ``student`` is left alone."""
    leaf = student.detach().clone().requires_grad_()
    kd_loss(leaf * 1, targets, labels, **settings).loss.backward()
    assert leaf.grad is not None
    return leaf.grad


def value_of(student: Tensor, targets: Targets | None, labels: Tensor, **settings: Any) -> float:
    """The loss alone."""
    return float(kd_loss(student.detach(), targets, labels, **settings).loss)
