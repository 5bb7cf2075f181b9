"""The definition of the distillation loss and of its gradient, in torch, in any floating precision.

For a row with student logits s, teacher distribution p, label y, student temperature T, q = softmax(s / T)::

    ce = -log softmax(s)[y]                     d ce / d s = softmax(s) - onehot(y)
    forward   kd = KL(p || q)                   d kd / d s = (q - p) / T
    reverse   kd = KL(q || p)                   d kd / d s = q (log(q / p) - kd) / T
    jsd       kd = beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
                                                d kd / d s = (1 - beta) q (log(q / m) - KL(q || m)) / T
    loss = (ce_weight * sum ce + kd_weight * T^2 * sum kd) / denominator

so the gradient of the KD term carries T, not T squared. p is softmax(t / T_t) for dense teacher logits t. For top-k
targets p has one entry for each of the row's tokens and one for all others together (the tail); q is folded the same
way, ``q_tail = sum of q outside the top-k``, and what falls on the tail's entry is shared among the tokens outside in
proportion to q (DistillKit and Megatron-LM call the tail a ghost logit; here it is exact at the teacher's
temperature).

s itself is the student's output x after bias, scale and soft-cap, ``s = cap tanh(scale (x + bias) / cap)``; the
gradient is that over x: ``d s / d x = scale (1 - (s / cap)^2)``.

Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2, for T squared; Agarwal et al. 2024, arXiv:2306.13649,
section 3, for the generalised JSD.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets

# Rows handled at a time: bounds the extra memory to a few times this many rows of fp32 logits.
CHUNK_ROWS = 64


@dataclass(frozen=True)
class RowLosses:
    """Per row, [N]: ``ce``, ``kd`` without T squared, and ``gradient`` [N, V] of the weighted sum, or None."""

    ce: Tensor
    kd: Tensor
    gradient: Tensor | None


def compute_dtype(logits: Tensor) -> torch.dtype:
    """fp64 stays fp64, everything else is computed in fp32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def shape_logits(x: Tensor, bias: Tensor | None, logit_scale: float, soft_cap: float | None) -> Tensor:
    """``cap * tanh(scale * (x + bias) / cap)`` [N, V]; minus infinity stays: it is padding, not a logit of -cap."""
    s = x if bias is None else x + bias.to(x.dtype)
    if logit_scale != 1.0:
        s = s * logit_scale
    if soft_cap is not None:
        s = torch.where(s == -torch.inf, s, soft_cap * torch.tanh(s / soft_cap))
    return s


def row_losses(
    student: Tensor,
    targets: Targets | None,
    labels: Tensor | None,
    settings: KDSettings,
    *,
    bias: Tensor | None = None,
    gradient: bool = False,
) -> RowLosses:
    """Losses of each row of ``student`` [N, V] and, if asked for, the gradient of ``ce_scale * ce + kd_scale * kd``.

    ``labels`` [N] int64 (None: no cross-entropy, every row counts); rows whose label is ``ignore_index`` give zeros.
    ``bias`` [V] is added to the student's output. A row with a NaN, with plus infinity or without a single finite logit
    gives NaN throughout; so does the gradient of a row whose reverse KL is infinite (the teacher excludes what the
    student does not).
    """
    dtype = compute_dtype(student)
    s = shape_logits(student.to(dtype), bias, settings.logit_scale, settings.soft_cap)
    log_q = torch.log_softmax(s / settings.temperature, dim=-1)
    q = log_q.exp()

    if targets is None:
        kd = s.new_zeros(s.shape[0])
        d_kd = torch.zeros_like(q)
    elif isinstance(targets, DenseTargets):
        log_p = torch.log_softmax(targets.logits.to(dtype) / settings.teacher_temperature, dim=-1)
        kd, d_kd = divergence_terms(log_p, log_q, settings)
    elif isinstance(targets, TopKTargets):
        kd, d_kd = _topk_terms(log_q, q, targets, settings)
    else:
        raise RefusedError(f"targets are {type(targets).__name__}: kd_loss takes DenseTargets or TopKTargets")

    if labels is None:
        ce = s.new_zeros(s.shape[0])
        ignored = torch.zeros(s.shape[0], dtype=torch.bool, device=s.device)
        safe_labels = None
        p_one = None
    else:
        ignored = labels == settings.ignore_index
        safe_labels = labels.masked_fill(ignored, 0)
        log_one = torch.log_softmax(s, dim=-1)
        ce = -log_one.gather(-1, safe_labels[:, None]).squeeze(-1)
        p_one = log_one.exp()

    bad = (q.sum(-1) + kd).isnan()
    ce = ce.masked_fill(bad, torch.nan).masked_fill(ignored, 0.0)
    kd = kd.masked_fill(bad, torch.nan).masked_fill(ignored, 0.0)
    if not gradient:
        return RowLosses(ce, kd, None)

    grad = d_kd * (settings.kd_scale / settings.temperature) if settings.kd_scale != 0.0 else torch.zeros_like(q)
    if p_one is not None and safe_labels is not None:
        p_one.scatter_add_(-1, safe_labels[:, None], torch.full_like(ce[:, None], -1.0))
        grad = grad + settings.ce_scale * p_one
    if settings.soft_cap is not None:
        # What the cap left of a padded logit is no slope: its probability is zero.
        slope = torch.where(s == -torch.inf, torch.zeros_like(s), 1 - (s / settings.soft_cap).square())
        grad = grad * slope
    if settings.logit_scale != 1.0:
        grad = grad * settings.logit_scale
    grad = grad.masked_fill(bad[:, None], torch.nan).masked_fill(ignored[:, None], 0.0)
    return RowLosses(ce, kd, grad)


def weighted_gap(weight: Tensor, gap: Tensor) -> Tensor:
    """weight * gap [N, E], where 0 * infinity is 0: what has no probability costs nothing; NaN stays NaN."""
    return torch.where(weight > 0, weight * gap, torch.where(weight.isnan(), weight, torch.zeros_like(weight)))


def log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log m of the generalised JSD, m = beta p + (1 - beta) q, [N, E]."""
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))


def divergence_terms(log_p: Tensor, log_q: Tensor, settings: KDSettings) -> tuple[Tensor, Tensor]:
    """The divergence [N] of two distributions over the same E entries, and T times its derivative [N, E]."""
    p, q = log_p.exp(), log_q.exp()
    if settings.direction == "forward":
        return weighted_gap(p, log_p - log_q).sum(-1), q - p
    if settings.direction == "reverse":
        gap = weighted_gap(q, log_q - log_p)
        kd = gap.sum(-1)
        return kd, (gap - q * kd[:, None]).masked_fill(kd.isinf()[:, None], torch.nan)
    beta = settings.beta
    log_m = log_mixture(log_p, log_q, beta)
    of_student = weighted_gap(q, log_q - log_m)
    to_student = of_student.sum(-1)
    kd = beta * weighted_gap(p, log_p - log_m).sum(-1) + (1 - beta) * to_student
    return kd, (1 - beta) * (of_student - q * to_student[:, None])


def _topk_terms(log_q: Tensor, q: Tensor, targets: TopKTargets, settings: KDSettings) -> tuple[Tensor, Tensor]:
    """The divergence [N] and its derivative times T [N, V] for top-k targets with a tail."""
    dtype = log_q.dtype
    present = targets.ids >= 0
    ids = targets.ids.long().clamp_min(0)
    at = (*present.nonzero(as_tuple=True)[:1], ids[present])  # rows and columns of the entries that are there
    raw = torch.cat(
        [targets.logprobs.to(dtype) / settings.teacher_temperature, targets.tail.to(dtype)[:, None]], dim=-1
    )
    log_p = torch.log_softmax(raw, dim=-1)
    # Summed over the tokens outside, not taken as a difference: the tail may be a millionth of the whole.
    outside = log_q.index_put(at, log_q.new_full((), -torch.inf))
    log_q_tail = torch.logsumexp(outside, dim=-1, keepdim=True)
    log_q_folded = torch.cat([log_q.gather(-1, ids).masked_fill(~present, -torch.inf), log_q_tail], dim=-1)
    kd, d_folded = divergence_terms(log_p, log_q_folded, settings)

    # softmax over the tokens outside; a student that excludes them all has nothing there to move.
    zero = torch.zeros((), dtype=dtype, device=log_q.device)
    share = torch.where(log_q_tail > -torch.inf, (outside - log_q_tail).exp(), zero)
    d_kd = share * d_folded[:, -1:]
    return kd, d_kd.index_put(at, d_folded[:, :-1][present])


def divergence(student: Tensor, targets: Targets, settings: KDSettings, *, bias: Tensor | None = None) -> Tensor:
    """The divergence of each row, [N], without T squared."""
    return torch.cat(
        [row_losses(student[rows], part, None, settings, bias=bias).kd for rows, part in chunks(student, targets)]
        or [student.new_zeros(0, dtype=compute_dtype(student))]
    )


def chunks(student: Tensor, targets: Targets | None) -> list[tuple[slice, Targets | None]]:
    """The rows in pieces of CHUNK_ROWS, with the part of the targets that belongs to each."""
    pieces: list[tuple[slice, Targets | None]] = []
    for start in range(0, student.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        part: Targets | None
        if isinstance(targets, DenseTargets):
            part = DenseTargets(targets.logits[rows])
        elif isinstance(targets, TopKTargets):
            part = TopKTargets(targets.ids[rows], targets.logprobs[rows], targets.tail[rows])
        else:
            part = None
        pieces.append((rows, part))
    return pieces
