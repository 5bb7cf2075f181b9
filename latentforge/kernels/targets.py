"""What a teacher says about a batch of positions, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentforge.errors import RefusedError


@dataclass(frozen=True)
class DenseTargets:
    """A teacher's logits at every position: ``logits`` [N, V], bf16 or fp32 (fp64 for the reference backend).

    Columns must be contiguous, rows may be further apart than V, so a truncated vocabulary can be passed as a view.
    """

    logits: Tensor


@dataclass(frozen=True)
class TopKTargets:
    """The k most likely tokens of a teacher at every position, and exactly how much lies outside them.

    ``ids`` [N, k] int32 or int64, no id twice in a row; ``logprobs`` [N, k] float32, natural logarithms at temperature
    1; ``tail`` [N] float32, log of the sum over the tokens outside the top-k of exp(logprob / T) **at the temperature
    of the teacher in the loss**, minus infinity where k is the whole vocabulary.

    Rows may have fewer than k entries: those at the end of a row are then *absent*, id -1 and logprob minus infinity.
    They count to the tokens outside, so such a row is the same as one of its own, smaller k. Where all are absent the
    teacher says nothing but that its mass lies somewhere: tail 0 = log 1, and the divergence is zero.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor


@dataclass(frozen=True)
class LinearTargets:
    """A teacher's last layer instead of its logits, for ``linear_kd_loss``: nothing of size [N, V] need exist.

    ``hidden`` [N, H_t] and ``weight`` [V, H_t], bf16 or fp32 (fp64 for the reference backend); the teacher's logits are
    ``cap * tanh(scale * (hidden @ weight.T + bias) / cap)`` with its own ``bias`` [V], ``logit_scale``, ``soft_cap``. A
    bias of minus infinity is padding of the vocabulary.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None


Targets = DenseTargets | TopKTargets


def topk_targets(logits: Tensor, k: int, temperature: float) -> TopKTargets:
    """Top-k targets of dense teacher logits [N, V], with the exact tail at ``temperature``; computed in fp64."""
    if not 1 <= k <= logits.shape[-1]:
        raise RefusedError(f"k = {k} is not between 1 and the vocabulary's size {logits.shape[-1]}")
    if not 0 < temperature < float("inf"):
        raise RefusedError(f"temperature = {temperature} is not a positive number")
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    values, ids = logprobs.topk(k, dim=-1)
    tail = torch.logsumexp(logprobs.scatter(-1, ids, -torch.inf) / temperature, dim=-1)
    return TopKTargets(ids, values.float(), tail.float())


def cut_rows(targets: TopKTargets, counts: Tensor, temperature: float) -> TopKTargets:
    """The same rows with the first ``counts`` [N] entries each: the others become absent, their mass joins the tail.

    ``temperature`` is that of the tail. The tail is computed in fp64.
    """
    cut = torch.arange(targets.ids.shape[1], device=targets.ids.device) >= counts[:, None]
    joining = (targets.logprobs.double() / temperature).masked_fill(~cut, -torch.inf)
    tail = torch.logsumexp(torch.cat([joining, targets.tail.double()[:, None]], dim=-1), dim=-1)
    return TopKTargets(targets.ids.masked_fill(cut, -1), targets.logprobs.masked_fill(cut, -torch.inf), tail.float())
