"""The energy score: a strictly proper rule for a head that can be drawn from, but has no density."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentforge.errors import RefusedError


@dataclass(frozen=True)
class EnergySettings:
    """``alpha`` of the distance, ``draws`` N of the head and ``samples`` M of the target, a chunk.

    The score is strictly proper for 0 < alpha < 2; CALM (arXiv 2510.27688) uses 1, 8 and 100.
    """

    alpha: float = 1.0
    draws: int = 8
    samples: int = 100

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and 0.0 < self.alpha < 2.0):
            raise RefusedError(
                f"alpha = {self.alpha:g}: the energy score is strictly proper between 0 and 2 alone",
                next="set alpha = 1.0",
            )
        if self.draws < 2:
            raise RefusedError(
                f"draws = {self.draws}: the distance between two draws of the head is a part of its score",
                next="set draws = 8",
            )
        if self.samples < 1:
            raise RefusedError(f"samples = {self.samples}: a chunk needs a target", next="set samples = 100")


def energy_score(drawn: Tensor, targets: Tensor, alpha: float = 1.0) -> Tensor:
    """2 E|x - y|^alpha - E|x - x'|^alpha of each row, [R]: lowest in expectation where x is distributed as y is.

    ``drawn`` [R, N, l] are N at least 2 draws x of the head, ``targets`` [R, M, l] the samples y, which get no
    gradient. The mean over pairs is that of different draws, so the value is unbiased for any N and M. fp32 at least,
    under autocast too; fp64 where the arguments are. Nothing of the size N * M * l is made. (CALM, equation of section
    3.3, with the sign of a loss.)
    """
    if drawn.dim() != 3 or targets.dim() != 3 or drawn.shape[::2] != targets.shape[::2]:
        raise RefusedError(
            f"draws {list(drawn.shape)} and targets {list(targets.shape)} are not [R, N, l] and [R, M, l]"
        )
    EnergySettings(alpha, drawn.shape[1], targets.shape[1])
    dtype = torch.promote_types(drawn.dtype, torch.float32)
    drawn, targets = drawn.to(dtype), targets.detach().to(dtype)
    count = drawn.shape[1]
    between = power_distances(drawn, drawn, alpha).sum((1, 2)) / (count * (count - 1))
    return 2.0 * power_distances(drawn, targets, alpha).mean((1, 2)) - between


def power_distances(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """|a_n - b_m|^alpha [R, N, M] of ``a`` [R, N, l] and ``b`` [R, M, l], fp32 or fp64, Euclidean.

    The square is expanded, so that no tensor of differences is made. Points closer than that can tell (about a
    thousandth of their spread in fp32) have distance 0 and pull at nothing: the gradient is finite wherever they
    coincide, as all draws of an untrained head do.
    """
    found: Tensor = _PowerDistances.apply(a, b, alpha)
    return found


class _PowerDistances(torch.autograd.Function):
    """The gradient is that of the differences, w_nm (a_n - b_m), summed as products of matrices.

    Autocast would round these products, forward and where ``backward`` is called under it.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, alpha: float) -> Tensor:
        # Distances do not change with the origin; near the points' middle the least is lost to cancellation.
        middle = b.mean(1, keepdim=True)
        a, b = a - middle, b - middle
        lengths = (a * a).sum(-1).unsqueeze(2) + (b * b).sum(-1).unsqueeze(1)
        with torch.autocast(a.device.type, enabled=False):
            square = torch.baddbmm(lengths, a, b.transpose(1, 2), alpha=-2.0)
        apart = square > 8.0 * torch.finfo(square.dtype).eps * lengths
        square = torch.where(apart, square, 1.0)
        distances = torch.where(apart, square.pow(alpha / 2), 0.0)
        slopes = torch.where(apart, alpha * square.pow(alpha / 2 - 1), 0.0)
        ctx.save_for_backward(a, b, slopes)
        return distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b, slopes = ctx.saved_tensors
        pull = grad * slopes
        with torch.autocast(a.device.type, enabled=False):
            to_a = a * pull.sum(2).unsqueeze(-1) - pull @ b if ctx.needs_input_grad[0] else None
            to_b = b * pull.sum(1).unsqueeze(-1) - pull.transpose(1, 2) @ a if ctx.needs_input_grad[1] else None
        return to_a, to_b, None
