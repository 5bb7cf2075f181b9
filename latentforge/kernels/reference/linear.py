"""The definition of ``linear_kd_loss``: a product, the loss of its rows, and two products for the gradients.

::

    x = hidden @ weight.T            d_hidden = g @ weight
    g = the gradient over x          d_weight = g.T @ hidden         d_bias = sum of g over the rows

where the loss of a row of x and g are those of ``reference.kd``, and the bias is added there. Everything is computed in
fp32, or in fp64 where the hidden states are; a few rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentforge.kernels.reference import kd
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, LinearTargets, Targets, TopKTargets


@dataclass(frozen=True)
class LinearLosses:
    """``ce`` and ``kd`` without T squared, of the rows or those that count; gradients of the weighted sum, or None."""

    ce: Tensor
    kd: Tensor
    d_hidden: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Targets | LinearTargets | None,
    labels: Tensor,
    settings: KDSettings,
    *,
    gradient: bool,
) -> LinearLosses:
    """Losses of each row of ``hidden`` [N, H] under ``weight`` [V, H] and, if asked for, all three gradients."""
    dtype = kd.compute_dtype(hidden)
    weight = weight.to(dtype)
    # An ignored row may hold anything, and nothing times NaN is NaN.
    ignored = labels == settings.ignore_index
    hidden = hidden.to(dtype).masked_fill(ignored[:, None], 0.0)
    found = LinearLosses(
        hidden.new_zeros(len(hidden)),
        hidden.new_zeros(len(hidden)),
        torch.zeros_like(hidden) if gradient else None,
        torch.zeros_like(weight) if gradient else None,
        weight.new_zeros(len(weight)) if gradient else None,
    )
    for start in range(0, len(hidden), kd.CHUNK_ROWS):
        rows = slice(start, start + kd.CHUNK_ROWS)
        x = hidden[rows] @ weight.T
        part = targets_of(targets, rows, dtype)
        losses = kd.row_losses(x, part, labels[rows], settings, bias=bias, gradient=gradient)
        found.ce[rows], found.kd[rows] = losses.ce, losses.kd
        if losses.gradient is None or found.d_hidden is None or found.d_weight is None or found.d_bias is None:
            continue
        found.d_hidden[rows] = losses.gradient @ weight
        found.d_weight.add_(losses.gradient.T @ hidden[rows])
        found.d_bias.add_(losses.gradient.sum(0))
    return found


def targets_of(targets: Targets | LinearTargets | None, rows: slice, dtype: torch.dtype) -> Targets | None:
    """The targets of some rows, a teacher's last layer as the logits that it gives."""
    if isinstance(targets, LinearTargets):
        logits = targets.hidden[rows].to(dtype) @ targets.weight.to(dtype).T
        return DenseTargets(kd.shape_logits(logits, targets.bias, targets.logit_scale, targets.soft_cap))
    if isinstance(targets, DenseTargets):
        return DenseTargets(targets.logits[rows])
    if isinstance(targets, TopKTargets):
        return TopKTargets(targets.ids[rows], targets.logprobs[rows], targets.tail[rows])
    return None
