"""How certain a figure of text is: whole documents or rows resampled, since neighbours are no independent evidence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latentforge.errors import RefusedError


class Interval(NamedTuple):
    """A figure with its bootstrap interval ``low`` to ``high`` and standard ``error``."""

    value: float
    low: float
    high: float
    error: float


def resampled_sums(values: Tensor, *, groups: Tensor | None, resamples: int, seed: int) -> Tensor:
    """Sums fp64 [resamples, m + 1] of ``values`` [B, m] over resampled groups, and how many of the B each has.

    ``groups`` int64 [B] says which belong together (None: each by itself). The same arguments give the same sums.
    """
    member = torch.arange(len(values)) if groups is None else torch.unique(groups, return_inverse=True)[1]
    count = int(member.max()) + 1
    sums = torch.zeros(count, values.shape[1] + 1, dtype=torch.float64)
    sums.index_add_(0, member, torch.cat([values.double(), torch.ones(len(values), 1).double()], dim=1))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(resamples, values.shape[1] + 1, dtype=torch.float64)
    for number in range(resamples):
        drawn[number] = sums[torch.randint(count, (count,), generator=generator)].sum(0)
    return drawn


def check_interval(confidence: float, resamples: int) -> None:
    """RefusedError where there is no interval of that ``confidence``, or too few ``resamples`` for one."""
    if not 0 < confidence < 1 or resamples < 2:
        raise RefusedError(
            f"confidence = {confidence}, resamples = {resamples}: a share below 1 and at least 2 are needed"
        )


def interval(value: float, drawn: Tensor, confidence: float) -> Interval:
    """The percentile interval of a figure ``value``, of the same figure ``drawn`` fp64 [R] of resamples."""
    edge = (1 - confidence) / 2
    return Interval(value, float(drawn.quantile(edge)), float(drawn.quantile(1 - edge)), float(drawn.std()))


def ratio(above: Tensor, below: Tensor, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0) -> Interval:
    """sum(above) / sum(below) of rows [B] each: bits over bytes, say. RefusedError where the rows are none."""
    check_interval(confidence, resamples)
    if above.ndim != 1 or above.shape != below.shape or not float(below.sum()) > 0:
        raise RefusedError(f"rows {list(above.shape)} over {list(below.shape)} that sum to nothing have no ratio")
    sums = resampled_sums(torch.stack([above, below], dim=1), groups=None, resamples=resamples, seed=seed)
    kept = sums[sums[:, 1] > 0]
    return interval(float(above.double().sum() / below.double().sum()), kept[:, 0] / kept[:, 1], confidence)
