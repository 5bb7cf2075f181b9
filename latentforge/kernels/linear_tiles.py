"""The gradient of a tile of the vocabulary, from what its rows came to over the whole of it.

``linear_kd_loss`` may not keep logits of all rows, so where the gradient of the weight is wanted for more rows than
fit, it meets each logit twice: once in its row, where the loss is computed, and once in its column. In the second
meeting a row's sums are known and the gradient is a matter of single elements. The formulas are ``reference.kd``'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentforge.kernels.reference.kd import divergence_terms, log_mixture, shape_logits, weighted_gap
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets

# Rows whose sums are taken at a time: their temporaries are this many rows of fp32 logits each.
BLOCK_ROWS = 4


@dataclass(frozen=True)
class RowSums:
    """What the gradient needs to know of whole rows, fp32 [N].

    ``log_one`` and ``log_student``: log of the sum of exp(s) and of exp(s / T). Dense targets: ``log_teacher`` of
    exp(t / T_t), and ``offset``, what reverse KL and JSD subtract. Top-k: ``log_outside``, log of the student's
    probability outside the top-k, and T times the derivatives of the folded entries: ``d_outside`` [N],
    ``d_entries`` [N, k]. ``bad`` bool [N]: rows whose gradient is NaN throughout.
    """

    log_one: Tensor
    log_student: Tensor
    log_teacher: Tensor
    offset: Tensor
    log_outside: Tensor
    d_outside: Tensor
    d_entries: Tensor
    bad: Tensor

    @staticmethod
    def joined(parts: list[RowSums]) -> RowSums:
        """Of all the rows, in order."""
        return RowSums(*(torch.cat(column) for column in zip(*(vars(p).values() for p in parts), strict=True)))

    def judged(self, ce: Tensor, kd: Tensor, settings: KDSettings) -> RowSums:
        """The same with ``bad`` as the row kernel found it: a loss that is NaN, or a reverse KL that is infinite."""
        bad = ce.isnan() | kd.isnan()
        if settings.direction == "reverse" and settings.kd_scale != 0.0:
            bad |= kd.isinf()
        return replace(self, bad=bad)


def row_sums(x: Tensor, targets: Targets | None, bias: Tensor | None, settings: KDSettings) -> RowSums:
    """The sums of the rows of logits ``x`` fp32 [n, V]; nothing is written."""
    found = []
    for start in range(0, len(x), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        found.append(_block_sums(x[rows], _rows_of(targets, rows), bias, settings))
    return RowSums.joined(found)


def _rows_of(targets: Targets | None, rows: slice) -> Targets | None:
    if isinstance(targets, DenseTargets):
        return DenseTargets(targets.logits[rows])
    if isinstance(targets, TopKTargets):
        return TopKTargets(targets.ids[rows], targets.logprobs[rows], targets.tail[rows])
    return None


def _block_sums(x: Tensor, targets: Targets | None, bias: Tensor | None, settings: KDSettings) -> RowSums:
    s = shape_logits(x, bias, settings.logit_scale, settings.soft_cap)
    log_one = s.logsumexp(-1)
    s = s / settings.temperature
    log_student = s.logsumexp(-1)
    log_teacher = offset = log_outside = d_outside = torch.zeros_like(log_one)
    d_entries = x.new_zeros(len(x), 0)
    if isinstance(targets, DenseTargets):
        t = targets.logits.float() / settings.teacher_temperature
        log_teacher = t.logsumexp(-1)
        if settings.direction != "forward":
            log_p, log_q = t.sub_(log_teacher[:, None]), s.sub_(log_student[:, None])
            other = log_p if settings.direction == "reverse" else log_mixture(log_p, log_q, settings.beta)
            offset = weighted_gap(log_q.exp(), log_q - other).sum(-1)
    elif isinstance(targets, TopKTargets):
        log_q = s.sub_(log_student[:, None])
        present = targets.ids >= 0
        ids = targets.ids.long().clamp_min(0)
        entries = log_q.gather(-1, ids).masked_fill_(~present, -torch.inf)
        # Absent entries take token 0 to the lesser of itself and infinity: no list of those present, which would make
        # a GPU wait for each block.
        lowered = torch.where(present, -torch.inf, torch.inf)
        log_outside = log_q.scatter_reduce_(-1, ids, lowered, "amin").logsumexp(-1)
        raw = torch.cat([targets.logprobs / settings.teacher_temperature, targets.tail[:, None]], dim=-1)
        folded = torch.cat([entries, log_outside[:, None]], dim=-1)
        _, derivative = divergence_terms(raw.log_softmax(-1), folded, settings)
        d_entries, d_outside = derivative[:, :-1], derivative[:, -1]
    bad = torch.zeros_like(log_one, dtype=torch.bool)
    return RowSums(log_one, log_student, log_teacher, offset, log_outside, d_outside, d_entries, bad)


def tile_gradient(
    x: Tensor,
    columns: slice,
    targets: Targets | None,
    labels: Tensor,
    bias: Tensor | None,
    settings: KDSettings,
    sums: RowSums,
) -> Tensor:
    """The gradient over the logits ``x`` fp32 [N, v] of the tokens ``columns``, which it may overwrite.

    ``targets``: dense logits of these columns, or all of the top-k entries; ``labels`` [N] and ``sums`` of the rows,
    none of which is ignored; ``bias`` [V] whole.
    """
    s = shape_logits(x, None if bias is None else bias[columns], settings.logit_scale, settings.soft_cap)
    if settings.kd_scale == 0.0 or targets is None:
        gradient = torch.zeros_like(x)
    else:
        log_q = (s / settings.temperature).sub_(sums.log_student[:, None])
        gradient = _divergence_gradient(log_q, columns, targets, settings, sums)
        gradient *= settings.kd_scale / settings.temperature
    if settings.ce_scale != 0.0:
        gradient.add_((s - sums.log_one[:, None]).exp_(), alpha=settings.ce_scale)
        here = _inside(labels, columns).nonzero().squeeze(-1)
        gradient[here, labels[here] - columns.start] -= settings.ce_scale
    if settings.soft_cap is not None:
        slope = 1 - (s / settings.soft_cap).square_()
        gradient *= slope.masked_fill_(s == -torch.inf, 0.0)
    if settings.logit_scale != 1.0:
        gradient *= settings.logit_scale
    return gradient.masked_fill_(sums.bad[:, None], torch.nan)


def _divergence_gradient(
    log_q: Tensor, columns: slice, targets: Targets, settings: KDSettings, sums: RowSums
) -> Tensor:
    """T times the derivative of the divergence [N, v]; ``log_q`` is overwritten."""
    if isinstance(targets, TopKTargets):
        # Shared among the tokens outside in proportion; a student that excludes them all has nothing there to move.
        share = log_q.sub_(sums.log_outside[:, None]).exp_().masked_fill_(sums.log_outside[:, None] == -torch.inf, 0.0)
        gradient = share.mul_(sums.d_outside[:, None])
        rows, entries = _inside(targets.ids, columns).nonzero(as_tuple=True)
        gradient[rows, targets.ids[rows, entries].long() - columns.start] = sums.d_entries[rows, entries]
        return gradient
    log_p = (targets.logits.float() / settings.teacher_temperature).sub_(sums.log_teacher[:, None])
    if settings.direction == "forward":
        return log_q.exp_().sub_(log_p.exp_())
    q = log_q.exp()
    if settings.direction == "reverse":
        return weighted_gap(q, log_q.sub_(log_p)).sub_(q.mul_(sums.offset[:, None]))
    gap = weighted_gap(q, log_q - log_mixture(log_p, log_q, settings.beta))
    return gap.sub_(q.mul_(sums.offset[:, None])).mul_(1 - settings.beta)


def _inside(ids: Tensor, columns: slice) -> Tensor:
    return (ids >= columns.start) & (ids < columns.stop)
