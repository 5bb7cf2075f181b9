"""BrierLM: how well a model that can only be drawn from predicts the next four tokens, with an interval.

Brier(P, y) = 2 P(y) - sum P^2 is strictly proper, and two draws estimate it without bias: [x1 = y] + [x2 = y] -
[x1 = x2]. Order n = 1..4 takes the first n tokens as one outcome; BrierLM = 100 (B1 B2 B3 B4)^(1/4) (CALM, arXiv
2510.27688). Higher is better. Here all pairs of N draws are used, and an order below 0 counts as 0 by itself: with the
product alone held at 0, two orders below it would give a good mark.

A value depends on the text, the context and where contexts begin: compare values of one protocol alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.students.latent.bootstrap import check_interval, interval, resampled_sums
from latentforge.students.latent.chunks import absorbed

ORDERS = 4


class BrierLM(NamedTuple):
    """``value`` with its bootstrap interval ``low`` to ``high`` and standard ``error``; ``orders`` B1 to B4 as they are
    (below 0 too) with ``order_errors``, over ``contexts`` contexts."""

    value: float
    low: float
    high: float
    error: float
    orders: tuple[float, ...]
    order_errors: tuple[float, ...]
    contexts: int


class DrawAfter(Protocol):
    """A model of K tokens a step, drawn after a context and what was drawn after it before."""

    def __call__(self, contexts: Tensor, before: Tensor, numbers: Tensor) -> Tensor:
        """int64 [R, K]: the next chunk of draw ``numbers`` [R] of ``contexts`` [R], after ``before`` int64 [R, j K]."""
        ...


def sample_scores(samples: Tensor, truth: Tensor) -> Tensor:
    """Orders 1 to 4 of each context, fp64 [B, 4], from draws ``samples`` int64 [B, N, 4] or longer, N of at least 2.

    ``truth`` int64 [B, 4] or longer is the text's own continuation. Unbiased: the mean over all draws and all pairs.
    """
    draws = _check(samples, truth)
    hits = same_so_far(samples, truth[:, None])
    alike = torch.cat([same_so_far(x[:, :, None], x[:, None]).sum((1, 2)) for x in samples.split(at_once(draws**2))])
    return 2 * hits.double().mean(1) - (alike - draws).double() / (draws * (draws - 1))


def token_scores(truth_logprobs: Tensor, samples: Tensor, collisions: Tensor) -> Tensor:
    """The same of a model that gives token probabilities, fp64 [B, 4], with less noise than ``sample_scores``.

    ``truth_logprobs`` fp [B, 4]: log-probability of each token of the text given what is before it. ``samples`` int64
    [B, N, 4]: continuations drawn from the model at temperature 1; ``collisions`` fp [B, N, 4]: sum over the vocabulary
    of p^2 in the distribution from which that token was drawn. P(y) is exact; sum P^2 is the share of pairs that agree
    before the last token, times the exact sum of the last.
    """
    draws = _check(samples, truth_logprobs)
    if collisions.shape != samples.shape:
        raise RefusedError(
            f"collisions are {list(collisions.shape)}, samples {list(samples.shape)}; both are [B, N, 4]"
        )
    right = truth_logprobs[:, :ORDERS].double().cumsum(1).exp()
    alike = torch.cat([same_so_far(x[:, :, None], x[:, None]).sum(2) for x in samples.split(at_once(draws**2))])
    # How many draws, itself among them, agree with each before its token of an order: all before the first.
    before = torch.cat([torch.full_like(alike[..., :1], draws), alike[..., :-1]], dim=-1)
    together = ((before - 1) * collisions[..., :ORDERS].double()).sum(1) / (draws * (draws - 1))
    return 2 * right - together


def brier_lm(
    scores: Tensor,
    *,
    groups: Tensor | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> BrierLM:
    """BrierLM of the scores [B, 4] of contexts, with a percentile bootstrap over contexts.

    ``groups`` int64 [B] says which contexts belong together (their document): whole groups are resampled then, since
    neighbours are no independent evidence. The same scores and ``seed`` give the same interval.
    """
    if scores.ndim != 2 or scores.shape[1] != ORDERS or not len(scores) or not bool(scores.isfinite().all()):
        raise RefusedError(
            f"scores {list(scores.shape)}: finite numbers [B, {ORDERS}] of at least one context are needed"
        )
    check_interval(confidence, resamples)
    sums = resampled_sums(scores, groups=groups, resamples=resamples, seed=seed)
    drawn = sums[:, :-1] / sums[:, -1:]
    values = torch.tensor([_combined(orders) for orders in drawn.tolist()], dtype=torch.float64)
    orders = scores.double().mean(0).tolist()
    whole = interval(_combined(orders), values, confidence)
    return BrierLM(*whole, tuple(orders), tuple(drawn.std(0).tolist()), len(scores))


def roll_out(draw: DrawAfter, truth: Tensor, *, chunk: int, draws: int, eos_id: int | None = None) -> Tensor:
    """``draws`` continuations of four tokens of each context, int64 [B, draws, 4], by ``chunk`` tokens a step.

    ``truth`` int64 [B, 4], or [B, M, 4] where draws are compared with M texts. Where one chunk is shorter than that,
    each draw goes on after its own tokens, as long as they agree with a text or with another draw of the context: what
    follows otherwise changes no score and is -1. What follows ``eos_id`` in a draw is ``eos_id`` again: an ended text
    is one outcome.
    """
    contexts = len(truth)
    texts = truth if truth.ndim == 3 else truth[:, None]
    context = torch.arange(contexts).repeat_interleave(draws)
    number = torch.arange(draws).repeat(contexts)
    found = draw(context, torch.empty(len(context), 0, dtype=torch.int64), number)
    while found.shape[1] < ORDERS:
        found = found if eos_id is None else absorbed(found, eos_id)
        going = _still_matters(found.reshape(contexts, draws, -1), texts).reshape(-1)
        after = torch.full((len(found), chunk), -1, dtype=torch.int64)
        if eos_id is not None:
            ended = found[:, -1] == eos_id
            after[ended] = eos_id
            going &= ~ended
        if bool(going.any()):
            after[going] = draw(context[going], found[going], number[going])
        found = torch.cat([found, after], dim=1)
    found = found if eos_id is None else absorbed(found, eos_id)
    return found[:, :ORDERS].reshape(contexts, draws, ORDERS)


def _check(samples: Tensor, truth: Tensor) -> int:
    if samples.ndim != 3 or samples.shape[1] < 2 or samples.shape[2] < ORDERS:
        raise RefusedError(
            f"samples are {list(samples.shape)}; [B, N, {ORDERS}] of at least two draws a context are needed",
            next="draw more, or roll out chunks of fewer than four tokens with roll_out",
        )
    if truth.ndim != 2 or len(truth) != len(samples) or truth.shape[1] < ORDERS:
        raise RefusedError(f"the text is {list(truth.shape)}; [{len(samples)}, {ORDERS}] is needed")
    return samples.shape[1]


def same_so_far(left: Tensor, right: Tensor) -> Tensor:
    """bool [..., 4]: whether the first 1, 2, 3, 4 tokens of both agree."""
    return (left[..., :ORDERS] == right[..., :ORDERS]).cumprod(-1).bool()


def at_once(pairs: int) -> int:
    """How many contexts, of ``pairs`` pairs of draws each, are compared at once: some 2^22 comparisons."""
    return max(1, 2**20 // pairs)


def _still_matters(found: Tensor, texts: Tensor) -> Tensor:
    """bool [B, N] of ``found`` [B, N, j]: whether draw n equals a text of [B, M, 4] so far, or another draw."""
    alike = (found[:, :, None] == found[:, None]).all(-1).sum(-1) > 1
    return alike | (found[:, :, None] == texts[:, None, :, : found.shape[2]]).all(-1).any(-1)


def _combined(orders: list[float]) -> float:
    return 100 * math.prod(max(order, 0.0) for order in orders) ** (1 / ORDERS)
