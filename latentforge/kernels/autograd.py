"""The loss as torch operators: one that overwrites the logits with their gradient, one that only reads.

The gradient is computed where the loss is, in the forward pass, and put over the logits: nothing of size [N, V] is
allocated, and the backward pass only hands it on (Liger-Kernel and flash-linear-attention do the same). What the
operator writes to is declared (``mutates_args``), so torch.compile keeps the order right and autograd's version
counters refuse a graph in which somebody else had saved these logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels import cpu, reference
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets


def _targets(dense: Tensor | None, ids: Tensor | None, logprobs: Tensor | None, tail: Tensor | None) -> Targets | None:
    if dense is not None:
        return DenseTargets(dense)
    if ids is None or logprobs is None or tail is None:
        return None
    return TopKTargets(ids, logprobs, tail)


def _compute(
    logits: Tensor,
    targets: Targets | None,
    labels: Tensor,
    temperature: float,
    teacher_temperature: float,
    ce_weight: float,
    kd_weight: float,
    denominator: float,
    ignore_index: int,
    backend: str,
    write: bool,
) -> Tensor:
    """Both parts, [2] fp64: sums over the rows divided by the denominator, the KD part with its T squared."""
    if isinstance(targets, TopKTargets):
        _refuse_mass_outside_everything(targets, logits.shape[1])
    squared = temperature * temperature
    ce_scale, kd_scale = ce_weight / denominator, kd_weight * squared / denominator
    settings: dict[str, Any] = {
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "ce_scale": ce_scale,
        "kd_scale": kd_scale,
        "ignore_index": ignore_index,
    }
    if backend == "cpu":
        ce, kd = cpu.row_losses(logits, targets, labels, write_gradient=write, **settings)
        # numpy adds in one fixed order; torch splits a long sum over its threads.
        sums = torch.tensor([float(ce.numpy().sum()), float(kd.numpy().sum())], dtype=torch.float64)
    else:
        cpu.check_indices(targets, labels, logits.shape[1], ignore_index)
        sums = torch.zeros(2, dtype=torch.float64, device=logits.device)
        for rows, part in reference.chunks(logits, targets):
            found = reference.row_losses(logits[rows], part, labels[rows], gradient=write, **settings)
            sums += torch.stack([found.ce.double().sum(), found.kd.double().sum()])
            if found.gradient is not None:
                logits[rows] = found.gradient.to(logits.dtype)
    sums /= denominator
    sums[1] *= squared
    return sums


def _refuse_mass_outside_everything(targets: TopKTargets, vocab: int) -> None:
    if targets.ids.shape[1] == vocab and bool((targets.tail > -torch.inf).any()):
        row = int((targets.tail > -torch.inf).nonzero()[0, 0])
        raise RefusedError(
            f"tail {float(targets.tail[row]):.6g} at row {row}, but k = {vocab} is the whole vocabulary: "
            "the tail must be minus infinity"
        )


@torch.library.custom_op("latentforge::kd_gradient_", mutates_args=("logits",))
def kd_gradient_(
    logits: Tensor,
    dense: Tensor | None,
    ids: Tensor | None,
    logprobs: Tensor | None,
    tail: Tensor | None,
    labels: Tensor,
    temperature: float,
    teacher_temperature: float,
    ce_weight: float,
    kd_weight: float,
    denominator: float,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """Both parts of the loss, [2] fp64; ``logits`` [N, V] are replaced by the gradient of the weighted sum."""
    return _compute(
        logits,
        _targets(dense, ids, logprobs, tail),
        labels,
        temperature,
        teacher_temperature,
        ce_weight,
        kd_weight,
        denominator,
        ignore_index,
        backend,
        write=True,
    )


@torch.library.custom_op("latentforge::kd_parts", mutates_args=())
def kd_parts(
    logits: Tensor,
    dense: Tensor | None,
    ids: Tensor | None,
    logprobs: Tensor | None,
    tail: Tensor | None,
    labels: Tensor,
    temperature: float,
    teacher_temperature: float,
    ce_weight: float,
    kd_weight: float,
    denominator: float,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """Both parts of the loss, [2] fp64; nothing is written."""
    return _compute(
        logits,
        _targets(dense, ids, logprobs, tail),
        labels,
        temperature,
        teacher_temperature,
        ce_weight,
        kd_weight,
        denominator,
        ignore_index,
        backend,
        write=False,
    )


@torch.library.custom_op("latentforge::kd_scale_", mutates_args=("gradient",))
def kd_scale_(gradient: Tensor, factor: Tensor) -> None:
    """Multiplies the stored gradient by the gradient that arrives from above; by 1, as is usual, that costs nothing."""
    value = float(factor)
    if value != 1.0:
        gradient.mul_(value)


@kd_gradient_.register_fake
@kd_parts.register_fake
def _(logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(2, dtype=torch.float64)


@kd_scale_.register_fake
def _(gradient: Tensor, factor: Tensor) -> None:
    return None


class KDFunction(torch.autograd.Function):
    """Loss forward, stored gradient backward; once."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tensors: tuple[Any, ...], settings: tuple[Any, ...], weights: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        parts = kd_gradient_(logits, *tensors, *settings)
        ctx.save_for_backward(logits)
        ctx.spent = False
        ctx.mark_non_differentiable(parts)
        return weighted(parts, *weights, reference.compute_dtype(logits)), parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor, d_parts: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling():
            if ctx.spent:
                raise RefusedError(
                    "a second backward through kd_loss: its gradient lay over the logits and has been handed on",
                    next="call kd_loss again, with fresh logits",
                )
            ctx.spent = True
        (gradient,) = ctx.saved_tensors
        gradient = gradient.detach()
        kd_scale_(gradient, d_loss)
        return gradient, None, None, None


def weighted(parts: Tensor, ce_weight: float, kd_weight: float, dtype: torch.dtype) -> Tensor:
    """The loss from its parts. A part without weight is left out, so that an infinite one does not make 0 * inf."""
    terms = [weight * parts[i] for i, weight in enumerate((ce_weight, kd_weight)) if weight != 0.0]
    return torch.stack(terms).sum().to(dtype)


def refuse_logits_of_others(logits: Tensor) -> None:
    """Refuse logits that somebody else may still read: they would find the gradient there."""
    fresh = "pass the output of the last layer itself: a fresh contiguous [N, V] tensor (clone it if you need it again)"
    if logits.is_leaf:
        raise RefusedError(
            "the logits are a leaf that requires grad; kd_loss would write its gradient over them", next=fresh
        )
    if logits._base is not None:
        raise RefusedError(
            f"the logits are a view of a tensor of shape {tuple(logits._base.shape)}; "
            "kd_loss would write its gradient over that",
            next=fresh + "; flatten the hidden states before the last layer, not the logits after it",
        )
    if logits.untyped_storage().nbytes() != logits.numel() * logits.element_size():
        raise RefusedError("the logits are a part of a larger storage, which kd_loss would write over", next=fresh)
    if not logits.is_contiguous():
        raise RefusedError(f"the logits are not contiguous (strides {logits.stride()})", next=fresh)
