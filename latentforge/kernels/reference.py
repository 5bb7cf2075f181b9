"""The definition of the distillation loss and of its gradient, in torch, in any floating precision.

For a row with student logits s, teacher distribution p, label y, student temperature T::

    ce = -log softmax(s)[y]                     d ce / d s = softmax(s) - onehot(y)
    kd = KL(p || q),  q = softmax(s / T)        d kd / d s = (q - p) / T
    loss = (ce_weight * sum ce + kd_weight * T^2 * sum kd) / denominator

so the gradient of the KD term carries T, not T squared. p is softmax(t / T_t) for dense teacher logits t. For top-k
targets p has one entry for each of the k tokens and one for all others together (the tail); q is folded the same way,
``q_tail = sum of q outside the top-k``, and for a token i outside d kd / d s_i = q_i (1 - p_tail / q_tail) / T
(DistillKit and Megatron-LM call the tail a ghost logit; here it is exact at the teacher's temperature).

Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2, for T squared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


def row_losses(
    student: Tensor,
    targets: Targets | None,
    labels: Tensor | None,
    *,
    temperature: float,
    teacher_temperature: float,
    ce_scale: float = 0.0,
    kd_scale: float = 0.0,
    ignore_index: int = -100,
    gradient: bool = False,
) -> RowLosses:
    """Losses of each row of ``student`` [N, V] and, if asked for, the gradient of ``ce_scale * ce + kd_scale * kd``.

    ``ce_scale`` is ce_weight / denominator, ``kd_scale`` is kd_weight * T^2 / denominator. ``labels`` [N] int64 (None:
    no cross-entropy, every row counts); rows whose label is ``ignore_index`` give zeros. A row with a NaN, or without
    a single finite logit, gives NaN throughout.
    """
    dtype = compute_dtype(student)
    s = student.to(dtype)
    zero = torch.zeros((), dtype=dtype, device=s.device)
    log_q = torch.log_softmax(s / temperature, dim=-1)
    q = log_q.exp()

    if targets is None:
        kd = s.new_zeros(s.shape[0])
        d_kd = torch.zeros_like(q)
    elif isinstance(targets, DenseTargets):
        log_p = torch.log_softmax(targets.logits.to(dtype) / teacher_temperature, dim=-1)
        p = log_p.exp()
        # 0 * (minus infinity) is 0: a token that the teacher excludes costs nothing.
        kd = torch.where(p > 0, p * (log_p - log_q), torch.where(p.isnan(), p, zero)).sum(-1)
        d_kd = q - p
    else:
        kd, d_kd = _topk_terms(log_q, q, targets, teacher_temperature)

    if labels is None:
        ce = s.new_zeros(s.shape[0])
        ignored = torch.zeros(s.shape[0], dtype=torch.bool, device=s.device)
        safe_labels = None
        p_one = None
    else:
        ignored = labels == ignore_index
        safe_labels = labels.masked_fill(ignored, 0)
        log_one = torch.log_softmax(s, dim=-1)
        ce = -log_one.gather(-1, safe_labels[:, None]).squeeze(-1)
        p_one = log_one.exp()

    bad = (q.sum(-1) + d_kd.sum(-1)).isnan()
    ce = ce.masked_fill(bad, torch.nan).masked_fill(ignored, 0.0)
    kd = kd.masked_fill(bad, torch.nan).masked_fill(ignored, 0.0)
    if not gradient:
        return RowLosses(ce, kd, None)

    grad = d_kd * (kd_scale / temperature)
    if p_one is not None and safe_labels is not None:
        p_one.scatter_add_(-1, safe_labels[:, None], torch.full_like(ce[:, None], -1.0))
        grad = grad + ce_scale * p_one
    grad = grad.masked_fill(bad[:, None], torch.nan).masked_fill(ignored[:, None], 0.0)
    return RowLosses(ce, kd, grad)


def _topk_terms(log_q: Tensor, q: Tensor, targets: TopKTargets, teacher_temperature: float) -> tuple[Tensor, Tensor]:
    """KL [N] and its derivative times T [N, V] for top-k targets with a tail."""
    dtype = log_q.dtype
    ids = targets.ids.long()
    raw = torch.cat([targets.logprobs.to(dtype) / teacher_temperature, targets.tail.to(dtype)[:, None]], dim=-1)
    log_p = torch.log_softmax(raw, dim=-1)
    p, p_tail = log_p.exp()[:, :-1], log_p.exp()[:, -1:]
    log_q_top = log_q.gather(-1, ids)
    # Summed over the tokens outside, not taken as a difference: the tail may be a millionth of the whole.
    outside = log_q.scatter(-1, ids, -torch.inf)
    log_q_tail = torch.logsumexp(outside, dim=-1, keepdim=True)

    zero = torch.zeros((), dtype=dtype, device=log_q.device)
    terms = torch.cat([p * (log_p[:, :-1] - log_q_top), p_tail * (log_p[:, -1:] - log_q_tail)], dim=-1)
    weights = torch.cat([p, p_tail], dim=-1)
    kd = torch.where(weights > 0, terms, torch.where(weights.isnan(), weights, zero)).sum(-1)

    # softmax over the tokens outside; a student that excludes them all has nothing there to move.
    share = torch.where(log_q_tail > -torch.inf, (outside - log_q_tail).exp(), zero)
    target = share * p_tail
    target = target.scatter(-1, ids, p)
    return kd, q - target


def divergence(student: Tensor, targets: Targets, *, temperature: float, teacher_temperature: float) -> Tensor:
    """KL(p || q) of each row, [N], without T squared."""
    return torch.cat(
        [
            row_losses(student[rows], part, None, temperature=temperature, teacher_temperature=teacher_temperature).kd
            for rows, part in chunks(student, targets)
        ]
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
