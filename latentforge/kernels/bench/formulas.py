"""The operators as torch users write them for speed: what eager torch and torch.compile are given.

No special cases, fp32 inside, and in the linear ones logits in the precision of the tensors, as ``linear`` gives them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def dense(
    s: Tensor,
    t: Tensor,
    y: Tensor,
    temperature: float,
    ce_scale: float,
    kd_scale: float,
    direction: str = "forward",
) -> Tensor:
    """CE and KL of dense targets [2]; the gradient of the weighted sum is written over ``s`` [n, V]."""
    sf = s.float()
    log_q = torch.log_softmax(sf / temperature, -1)
    log_p = torch.log_softmax(t.float() / temperature, -1)
    p, q = log_p.exp(), log_q.exp()
    if direction == "forward":
        kd = (p * (log_p - log_q)).sum(-1)
        gradient = (q - p) * (kd_scale / temperature)
    else:
        gap = log_q - log_p
        kd = (q * gap).sum(-1)
        gradient = q * (gap - kd[:, None]) * (kd_scale / temperature)
    ce = _add_cross_entropy(sf, y, ce_scale, gradient)
    s.copy_(gradient)
    return torch.stack([ce.sum(), kd.sum()])


def topk(
    s: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    y: Tensor,
    temperature: float,
    ce_scale: float,
    kd_scale: float,
    direction: str = "forward",
) -> Tensor:
    """The same for top-k targets with a tail."""
    sf = s.float()
    log_q = torch.log_softmax(sf / temperature, -1)
    log_p = torch.log_softmax(torch.cat([logprobs / temperature, tail[:, None]], -1), -1)
    q = log_q.exp()
    log_q_top = log_q.gather(-1, ids)
    q_top = log_q_top.exp()
    q_tail = (1 - q_top.sum(-1, keepdim=True)).clamp_min(1e-30)
    folded = torch.cat([log_q_top, q_tail.log()], -1)
    if direction == "forward":
        p = log_p.exp()
        kd = (p * (log_p - folded)).sum(-1)
        per_token = 1 - p[:, -1:] / q_tail
        at_top = q_top - p[:, :-1]
    else:
        gap = folded - log_p
        kd = (folded.exp() * gap).sum(-1)
        per_token = gap[:, -1:] - kd[:, None]
        at_top = q_top * (gap[:, :-1] - kd[:, None])
    gradient = (q * per_token).scatter(-1, ids, at_top) * (kd_scale / temperature)
    ce = _add_cross_entropy(sf, y, ce_scale, gradient)
    s.copy_(gradient)
    return torch.stack([ce.sum(), kd.sum()])


def _add_cross_entropy(sf: Tensor, y: Tensor, ce_scale: float, gradient: Tensor) -> Tensor:
    """The cross-entropy of each row; its gradient is added to ``gradient`` where it has a weight."""
    if ce_scale == 0.0:
        return torch.zeros_like(sf[:, 0])
    log_one = torch.log_softmax(sf, -1)
    ce = -log_one.gather(-1, y[:, None]).squeeze(-1)
    gradient.add_(log_one.exp() * ce_scale)
    gradient.scatter_add_(-1, y[:, None], torch.full_like(ce[:, None], -ce_scale))
    return ce


def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    y: Tensor,
    temperature: float,
    ce_scale: float,
    kd_scale: float,
) -> Tensor:
    """The differentiable loss of some rows of ``hidden`` [n, H] under ``weight`` [V, H], top-k targets."""
    sf = functional.linear(hidden, weight).float()
    log_q = torch.log_softmax(sf / temperature, -1)
    log_p = torch.log_softmax(torch.cat([logprobs / temperature, tail[:, None]], -1), -1)
    log_q_top = log_q.gather(-1, ids)
    q_tail = (1 - log_q_top.exp().sum(-1, keepdim=True)).clamp_min(1e-30)
    kd = (log_p.exp() * (log_p - torch.cat([log_q_top, q_tail.log()], -1))).sum()
    ce = functional.cross_entropy(sf, y, reduction="sum")
    return ce_scale * ce + kd_scale * kd


def linear_dense(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    y: Tensor,
    temperature: float,
    ce_scale: float,
    kd_scale: float,
) -> Tensor:
    """The same with a teacher's layer as the target."""
    sf = functional.linear(hidden, weight).float()
    with torch.no_grad():
        log_p = torch.log_softmax(functional.linear(teacher_hidden, teacher_weight).float() / temperature, -1)
    log_q = torch.log_softmax(sf / temperature, -1)
    kd = functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
    ce = functional.cross_entropy(sf, y, reduction="sum")
    return ce_scale * ce + kd_scale * kd


def drawn(hidden: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A token for each row [N] and its log-probability: the likeliest at temperature 0, else a Gumbel-max draw."""
    return _choose(functional.linear(hidden, weight).float(), temperature)


def dequantised(hidden: Tensor, values: Tensor, scales: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same under int8 ``values`` [V, H] with a scale [V] for each token."""
    return _choose(functional.linear(hidden, values.to(hidden.dtype)).float() * scales, temperature)


def _choose(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if temperature == 0.0:
        top, ids = logits.max(-1)
        return ids, top - torch.logsumexp(logits, -1)
    scaled = logits / temperature
    ids = (scaled - torch.empty_like(scaled).exponential_().log()).argmax(-1)
    return ids, scaled.gather(-1, ids[:, None]).squeeze(-1) - torch.logsumexp(scaled, -1)
