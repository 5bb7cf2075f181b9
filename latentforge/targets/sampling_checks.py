"""The executable check that the contract ``sampled-targets`` names."""

from __future__ import annotations

from typing import Any

from latentforge.contracts import Finding

_ROWS, _VOCABULARY, _DRAWS = 8, 400, 12
_AT_ONCE = 40  # seeds
# An error of the mean beside the error that independent draws would leave; chance alone gives 1 or less.
_BOUND = 1.25


def unbiased(*, seeds: int = 400, mutant: str | None = None) -> Finding:
    """The mean KD gradient of drawn rows over many seeds tends to the gradient of the whole distribution.

    Compared with what as many independent draws would be off by, which falls with the root of their number; a bias
    does not fall. ``mutant``: ``renormalised`` cuts the rows at their top-k and makes that sum to one; ``largest``
    draws, and keeps of each row half of its entries, the largest; ``same_noise`` gives all seeds the same noise.
    """
    import torch

    from latentforge.kernels.fixtures import gradient_of, known_mutant
    from latentforge.kernels.targets import DenseTargets

    known_mutant(mutant, ("renormalised", "largest", "same_noise"))
    generator = torch.Generator().manual_seed(12)
    teacher = 2.5 * torch.randn(_ROWS, _VOCABULARY, generator=generator, dtype=torch.float64)
    student = teacher + torch.randn(_ROWS, _VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.zeros(_ROWS, dtype=torch.int64)
    asked: dict[str, Any] = {
        "temperature": 1.0,
        "ce_weight": 0.0,
        "kd_weight": 1.0,
        "denominator": 1.0,
        "backend": "reference",
    }
    whole = gradient_of(student, DenseTargets(teacher), labels, **asked)
    mean, spread = torch.zeros_like(whole), 0.0
    for begin in range(0, seeds, _AT_ONCE):
        block = [0 if mutant == "same_noise" else seed for seed in range(begin, min(begin + _AT_ONCE, seeds))]
        drawn = _drawn(teacher, block, mutant)
        several = gradient_of(student.repeat(len(block), 1), drawn, labels.repeat(len(block)), **asked)
        several = several.view(len(block), *whole.shape)
        mean += several.sum(0) / seeds
        spread += float((several - whole).square().sum()) / seeds
    p = torch.softmax(teacher, dim=-1)
    chance = float((p * (1 - p)).sum() / (_DRAWS * seeds)) ** 0.5
    error, size = float((mean - whole).norm()), float(whole.norm())
    return Finding(
        error < _BOUND * chance and spread > 0,
        f"the mean gradient over {seeds} seeds of {_DRAWS} draws is off by {error / size:.2%} of the whole one "
        f"(chance {chance / size:.2%}, bound {_BOUND * chance / size:.2%}); a single one by {spread**0.5 / size:.0%}",
        {"error": error, "chance": chance, "bound": _BOUND * chance, "whole": size, "single": spread**0.5},
    )


def _drawn(teacher: Any, seeds: list[int], mutant: str | None) -> Any:
    """Rows of several seeds, each of its own sequence, one seed after the other; or what a mutant makes of them."""
    import numpy as np
    import torch

    from latentforge.kernels.targets import TopKTargets, topk_targets
    from latentforge.targets.sampling import Sampling

    silent = torch.full((_ROWS * len(seeds),), -torch.inf)
    if mutant == "renormalised":
        cut = topk_targets(teacher, _DRAWS, 1.0)
        return TopKTargets(
            cut.ids.repeat(len(seeds), 1), torch.log_softmax(cut.logprobs, dim=-1).repeat(len(seeds), 1), silent
        )
    found = []
    for sampling in (Sampling(_DRAWS, seed) for seed in seeds):
        keys = torch.tensor([sampling.key(np.array([row, 1, 2])) for row in range(_ROWS)])
        found.append(sampling.rows(teacher, keys, torch.arange(_ROWS)))
    ids, logprobs = (torch.cat(parts) for parts in zip(*found, strict=True))
    if mutant == "largest":
        kept = _DRAWS // 2
        ids, logprobs = ids[:, :kept].contiguous(), torch.log_softmax(logprobs[:, :kept], dim=-1)
    return TopKTargets(ids, logprobs, silent)
