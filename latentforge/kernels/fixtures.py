"""Small inputs for the checks, and the loss and gradient as a caller of the public functions gets them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latentforge.kernels.api import kd_loss
from latentforge.kernels.decode_settings import DecodeSettings
from latentforge.kernels.noise import gumbel
from latentforge.kernels.targets import Targets

TEMPERATURES = (1.0, 2.0, 4.0)
WEIGHTS = ((0.3, 0.7), (0.7, 0.3), (1.0, 0.0), (0.0, 1.0), (0.5, 2.0))

# Eight tokens of 150 with equal logits, in several blocks of any backend; the others have no mass in any precision.
TIED = (3, 20, 63, 64, 71, 130, 131, 149)
# Where top-p ends among them: temperature, top_k, top_p, logit of token 140, and how many of TIED are allowed.
TIES_AT_TOP_P: dict[str, tuple[float, int | None, float, float | None, int]] = {
    "share reached by the fourth of eight": (1.0, None, 0.5, None, 4),
    "share reached by the first of eight": (2.0, None, 0.125, None, 1),
    "share just missed by the fourth": (1.0, None, 0.5 + 2.0**-20, None, 5),
    "all but one": (1.0, None, 0.875, None, 7),
    "half of the six that top-k leaves": (1.0, 6, 0.5, None, 3),
    "three of the four that top-k leaves": (1.0, 4, 0.75, None, 3),
    "in the middle of the third behind a larger": (1.0, None, (math.e + 2.5) / (math.e + 8), 1.0, 3),
    "behind a larger, of the five that top-k leaves": (1.0, 6, (math.e + 3.5) / (math.e + 5), 1.0, 4),
    "none behind a larger that has the share": (0.5, None, 0.4, 1.0, 0),
}


def known_mutant(mutant: str | None, known: tuple[str, ...]) -> None:
    """A misspelt control must raise: left alone it would plant nothing."""
    if mutant is not None and mutant not in known:
        raise ValueError(f"mutant {mutant!r} is not one of {known}")


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal fp64 numbers of a standard deviation, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def labels_of(seed: int, rows: int, vocab: int) -> Tensor:
    """Labels [rows] int64, uniform over the vocabulary."""
    return torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(seed))


def gradient_of(student: Tensor, targets: Targets | None, labels: Tensor, **settings: Any) -> Tensor:
    """The gradient of ``kd_loss`` over the logits [N, V], as autograd receives it; ``student`` is left alone."""
    leaf = student.detach().clone().requires_grad_()
    kd_loss(leaf * 1, targets, labels, **settings).loss.backward()
    assert leaf.grad is not None
    return leaf.grad


def value_of(student: Tensor, targets: Targets | None, labels: Tensor, **settings: Any) -> float:
    """The loss alone."""
    return float(kd_loss(student.detach(), targets, labels, **settings).loss)


def ties_at_top_p(case: str) -> tuple[tuple[Tensor, Tensor, DecodeSettings, Tensor, Tensor, None], list[int]]:
    """Arguments of a backend's decode for one of ``TIES_AT_TOP_P``, and the tokens that it must take.

    The tokens at the limit are equal exactly, so the definition says how many are in: the fewest whose share, with that
    of all before them, reaches top_p; of equals the lower ids. Two rows ask: in one the noise favours the last token
    that is allowed, in the other the first that is not.
    """
    temperature, top_k, top_p, larger, kept = TIES_AT_TOP_P[case]
    weight = torch.full((150, 1), -200.0)
    weight[list(TIED)] = 0.0
    ranked = list(TIED)
    if larger is not None:
        weight[140] = larger
        ranked, kept = [140, *ranked], kept + 1
    seeds = torch.arange(2000)
    scores = weight[ranked, 0] / temperature + gumbel(seeds[:, None], torch.tensor(7), torch.tensor(ranked))
    best = scores.argmax(1)
    asked = torch.stack([seeds[best == number][0] for number in (kept - 1, kept)])
    wanted = [ranked[int(scores[seed, :kept].argmax())] for seed in asked]
    assert wanted[0] == ranked[kept - 1], "the question about the last token is not heard"
    settings = DecodeSettings(150, temperature, top_k, top_p)
    return (torch.ones(2, 1), weight, settings, asked, torch.full((2,), 7), None), wanted
