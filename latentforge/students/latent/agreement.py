"""How far a student is from its teacher, as both are drawn from: 0 where they say the same, whatever the text says.

For each context D = sum (P - Q)^2 over the next n tokens as one outcome, P the student and Q the teacher: the energy
distance of the score that BrierLM is made of. It is E[x = x'] - 2 E[x = y] + E[y = y'] for draws x of the student and y
of the teacher, so pairs of draws estimate it without bias, and a value just below 0 is noise. In BrierLM's terms it is
what the teacher's own score has more than the student's, where the text is the teacher's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.students.latent.bootstrap import check_interval, interval, resampled_sums
from latentforge.students.latent.brier import ORDERS, at_once, same_so_far


class Agreement(NamedTuple):
    """``value`` is D1 + .. + D4 as a share of the teacher's own sums Q^2, in percent, with its bootstrap interval
    ``low`` to ``high`` and standard ``error``: 0 is the teacher itself, 100 a student that says nothing, more one that
    is sure of something else. ``orders`` are D1 to D4 as they are, with ``order_errors``, and ``teacher`` the sums of
    Q^2 of each; over ``contexts`` contexts."""

    value: float
    low: float
    high: float
    error: float
    orders: tuple[float, ...]
    order_errors: tuple[float, ...]
    teacher: tuple[float, ...]
    contexts: int


def agreement(
    samples: Tensor,
    teacher: Tensor,
    *,
    groups: Tensor | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Agreement:
    """The distance of draws ``samples`` int64 [B, N, 4] of a student from those of its ``teacher`` int64 [B, R, 4].

    Both after the same contexts; N and R of at least 2. Draws that do not go on (-1, see ``roll_out``) must have gone
    on as long as they agreed with one of the teacher's. ``groups`` int64 [B] as of ``brier_lm``.
    """
    check_interval(confidence, resamples)
    for what, drawn in (("the student", samples), ("the teacher", teacher)):
        if drawn.ndim != 3 or drawn.shape[1] < 2 or drawn.shape[2] < ORDERS or len(drawn) != len(samples):
            raise RefusedError(
                f"draws of {what} are {list(drawn.shape)}; [{len(samples)}, N, {ORDERS}] of at least two are needed"
            )
    if not len(samples):
        raise RefusedError("there is no context to compare draws in")
    own = _alike(teacher, teacher)
    far = _alike(samples, samples) - 2 * _alike(samples, teacher) + own
    sums = resampled_sums(torch.cat([far, own], dim=1), groups=groups, resamples=resamples, seed=seed)
    selves = own.mean(0)
    if not float(selves.sum()) > 0:
        raise RefusedError(
            f"no two draws of the teacher agree in {len(samples)} contexts: there is nothing to agree with",
            next="make more draws, or take more rows",
        )
    distances, whole = sums[:, :ORDERS], sums[:, ORDERS : 2 * ORDERS].sum(1)
    shares = 100 * distances[whole > 0].sum(1) / whole[whole > 0]
    found = interval(100 * float(far.mean(0).sum() / selves.sum()), shares, confidence)
    errors = (distances / sums[:, -1:]).std(0)
    return Agreement(*found, tuple(far.mean(0).tolist()), tuple(errors.tolist()), tuple(selves.tolist()), len(samples))


def _alike(left: Tensor, right: Tensor) -> Tensor:
    """fp64 [B, 4]: the share of pairs of different draws that agree in the first n tokens."""
    size = at_once(left.shape[1] * right.shape[1])
    blocks = zip(left.split(size), right.split(size), strict=True)
    found = torch.cat([same_so_far(x[:, :, None], y[:, None]).sum((1, 2)) for x, y in blocks]).double()
    if left is right:
        return (found - left.shape[1]) / (left.shape[1] * (left.shape[1] - 1))
    return found / (left.shape[1] * right.shape[1])
