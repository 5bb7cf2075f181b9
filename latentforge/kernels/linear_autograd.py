"""``linear_kd_loss`` as a torch operator: the loss and, where they are wanted, its gradients, all in one go.

Nothing that the caller passed is written. The gradients are made in the forward pass, where the logits of a chunk are
at hand, and handed on by the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels import backends, linear_sweeps
from latentforge.kernels.autograd import (
    kd_scale_,
    kernel_settings,
    parts_of,
    refuse_graph_of_gradient,
    targets_from,
    weighted,
)
from latentforge.kernels.indices import check_indices, refuse_mass_outside_everything
from latentforge.kernels.reference import linear as reference
from latentforge.kernels.reference.kd import compute_dtype
from latentforge.kernels.targets import LinearTargets, Targets, TopKTargets


@torch.library.custom_op("latentforge::linear_kd", mutates_args=())
def linear_kd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dense: Tensor | None,
    ids: Tensor | None,
    logprobs: Tensor | None,
    tail: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    teacher_scale: float,
    teacher_cap: float | None,
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
    chunk_rows: int | None,
    backend: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both parts of the loss [2] fp64, and d_hidden, d_weight, d_bias in the dtypes of their tensors.

    A gradient that is not wanted is not computed and comes as an empty tensor.
    """
    targets: Targets | LinearTargets | None = targets_from(dense, ids, logprobs, tail)
    if teacher_hidden is not None and teacher_weight is not None:
        targets = LinearTargets(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_cap)
    if isinstance(targets, TopKTargets):
        refuse_mass_outside_everything(targets, weight.shape[0])
    searched = None if isinstance(targets, LinearTargets) else targets
    check_indices(searched, labels, weight.shape[0], ignore_index)
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
    # Autocast has had its say on the arguments; in here it would round the logits.
    with torch.autocast(hidden.device.type, enabled=False):
        if backend == "reference":
            found = reference.loss_and_gradients(
                hidden, weight, bias, targets, labels, settings, gradient=want_hidden or want_weight or want_bias
            )
        else:
            found = linear_sweeps.loss_and_gradients(
                backend,
                linear_sweeps.without_ignored_rows(hidden, weight, bias, targets, labels, settings),
                want_hidden=want_hidden,
                want_weight=want_weight,
                want_bias=want_bias,
                chunk_rows=chunk_rows or linear_sweeps.default_chunk_rows(len(hidden), len(weight), hidden.device),
            )
    parts = parts_of(backends.summed(found.ce, found.kd), temperature, denominator)
    return (
        parts,
        _result(found.d_hidden, hidden, want_hidden),
        _result(found.d_weight, weight, want_weight),
        _result(found.d_bias, bias, want_bias),
    )


def _result(gradient: Tensor | None, of: Tensor | None, wanted: bool) -> Tensor:
    if gradient is None or of is None or not wanted:
        return torch.empty(0) if of is None else of.new_empty(0)
    return gradient.to(of.dtype)


@linear_kd.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted: tuple[bool, bool, bool] = args[-3:]
    nothing = torch.empty(0)

    def like(of: Tensor | None, want: bool) -> Tensor:
        return nothing if of is None else of.new_empty(of.shape if want else (0,))

    return (
        hidden.new_empty(2, dtype=torch.float64),
        like(hidden, wanted[0]),
        like(weight, wanted[1]),
        like(bias, wanted[2]),
    )


class LinearKDFunction(torch.autograd.Function):
    """Loss and gradients forward, the gradients handed on backward; once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tensors: tuple[Any, ...],
        settings: tuple[Any, ...],
        weights: tuple[float, float],
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor]:
        parts, *gradients = linear_kd(hidden, weight, bias, *tensors, *settings, *wanted)
        ctx.save_for_backward(*gradients)
        ctx.wanted = wanted
        ctx.spent = False
        ctx.mark_non_differentiable(parts)
        return weighted(parts, *weights, compute_dtype(hidden)), parts

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, d_parts: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph_of_gradient("linear_kd_loss")
        if not torch.compiler.is_compiling():
            if ctx.spent:
                raise RefusedError(
                    "a second backward through linear_kd_loss: its gradients have been handed on",
                    next="call linear_kd_loss again",
                )
            ctx.spent = True
        handed: list[Tensor | None] = []
        for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True):
            if wanted:
                kd_scale_(gradient, d_loss)
            handed.append(gradient if wanted else None)
        return (*handed, None, None, None, None)
