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
from latentforge.kernels import backends
from latentforge.kernels.indices import refuse_mass_outside_everything
from latentforge.kernels.reference.kd import compute_dtype
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets

# Rows whose gradient is widened at a time where a bias wants its sums.
COLUMN_SUM_ROWS = 64


def targets_from(
    dense: Tensor | None, ids: Tensor | None, logprobs: Tensor | None, tail: Tensor | None
) -> Targets | None:
    if dense is not None:
        return DenseTargets(dense)
    if ids is None or logprobs is None or tail is None:
        return None
    return TopKTargets(ids, logprobs, tail)


def _compute(
    logits: Tensor,
    targets: Targets | None,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float,
    teacher_temperature: float,
    ce_weight: float,
    kd_weight: float,
    denominator: float,
    direction: str,
    beta: float,
    logit_scale: float,
    soft_cap: float | None,
    ignore_index: int,
    backend: str,
    write: bool,
) -> Tensor:
    """Both parts, [2] fp64: sums over the rows divided by the denominator, the KD part with its T squared."""
    if isinstance(targets, TopKTargets):
        refuse_mass_outside_everything(targets, logits.shape[1])
    settings = kernel_settings(
        temperature,
        teacher_temperature,
        ce_weight,
        kd_weight,
        denominator,
        direction,
        beta,
        logit_scale,
        soft_cap,
        ignore_index,
    )
    sums = backends.kd_sums(backend, logits, targets, labels, settings, bias=bias, write_gradient=write)
    return parts_of(sums, temperature, denominator)


def kernel_settings(
    temperature: float,
    teacher_temperature: float,
    ce_weight: float,
    kd_weight: float,
    denominator: float,
    direction: str,
    beta: float,
    logit_scale: float,
    soft_cap: float | None,
    ignore_index: int,
) -> KDSettings:
    """What a kernel is told: the weights of the loss as the factors that a row's gradient has."""
    return KDSettings(
        temperature,
        teacher_temperature,
        ce_scale=ce_weight / denominator,
        kd_scale=kd_weight * temperature * temperature / denominator,
        direction=direction,
        beta=beta,
        logit_scale=logit_scale,
        soft_cap=soft_cap,
        ignore_index=ignore_index,
    )


def parts_of(sums: Tensor, temperature: float, denominator: float) -> Tensor:
    """Both parts of the loss, [2] fp64, from the two sums over the rows, which are overwritten."""
    sums /= denominator
    sums[1] *= temperature * temperature
    return sums


@torch.library.custom_op("latentforge::kd_gradient_", mutates_args=("logits",))
def kd_gradient_(
    logits: Tensor,
    dense: Tensor | None,
    ids: Tensor | None,
    logprobs: Tensor | None,
    tail: Tensor | None,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float,
    teacher_temperature: float,
    ce_weight: float,
    kd_weight: float,
    denominator: float,
    direction: str,
    beta: float,
    logit_scale: float,
    soft_cap: float | None,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """Both parts of the loss, [2] fp64; ``logits`` [N, V] are replaced by the gradient of the weighted sum."""
    return _compute(
        logits,
        targets_from(dense, ids, logprobs, tail),
        labels,
        bias,
        temperature,
        teacher_temperature,
        ce_weight,
        kd_weight,
        denominator,
        direction,
        beta,
        logit_scale,
        soft_cap,
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
    bias: Tensor | None,
    temperature: float,
    teacher_temperature: float,
    ce_weight: float,
    kd_weight: float,
    denominator: float,
    direction: str,
    beta: float,
    logit_scale: float,
    soft_cap: float | None,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """Both parts of the loss, [2] fp64; nothing is written."""
    return _compute(
        logits,
        targets_from(dense, ids, logprobs, tail),
        labels,
        bias,
        temperature,
        teacher_temperature,
        ce_weight,
        kd_weight,
        denominator,
        direction,
        beta,
        logit_scale,
        soft_cap,
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


def refuse_graph_of_gradient(op: str) -> None:
    """Refuse ``create_graph=True``: the gradient was computed outside of autograd and has no derivative of its own."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RefusedError(
            f"a backward with create_graph=True through {op}: its gradient has no derivative",
            next="call backward without create_graph, or use torch's own losses where a second derivative is needed",
        )


def _column_sums(gradient: Tensor) -> Tensor:
    """Sums over the rows, [V] fp32 (fp64 where the gradient is): some rows at a time, as torch widens what it sums."""
    sums = gradient.new_zeros(gradient.shape[1], dtype=compute_dtype(gradient))
    for rows in gradient.split(COLUMN_SUM_ROWS):
        sums += rows.sum(0, dtype=sums.dtype)
    return sums


class KDFunction(torch.autograd.Function):
    """Loss forward, stored gradient backward; once."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        bias: Tensor | None,
        tensors: tuple[Any, ...],
        settings: tuple[Any, ...],
        weights: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        parts = kd_gradient_(logits, *tensors, bias, *settings)
        ctx.save_for_backward(logits)
        ctx.spent = False
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(parts)
        return weighted(parts, *weights, compute_dtype(logits)), parts

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, d_parts: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph_of_gradient("kd_loss")
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
        d_bias = None
        if ctx.bias_dtype is not None and ctx.needs_input_grad[1]:
            d_bias = _column_sums(gradient).to(ctx.bias_dtype)
        return gradient, d_bias, None, None, None


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


def refuse_a_teacher_in_the_logits(logits: Tensor, teacher: Tensor | None) -> None:
    """Refuse teacher logits that lie where the gradient will be written: nobody expects their teacher to change."""
    if teacher is not None and teacher.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr() != 0:
        raise RefusedError(
            f"the teacher's logits of shape {tuple(teacher.shape)} share the storage of the student's, "
            "over which kd_loss would write its gradient",
            next="pass a copy: DenseTargets(logits.detach().clone())",
        )
