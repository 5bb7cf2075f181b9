"""The noise is close to fp64 at every word, and its distribution is Gumbel's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latentforge.kernels import noise


def exact(words: Tensor) -> Tensor:
    """-log(-log1p(-t)) in fp64; 1 - t from the complement, so that t near 1 loses nothing."""
    t = (words.double() + 0.5) * 2.0**-32
    rest = ((words ^ 0xFFFFFFFF).double() + 0.5) * 2.0**-32
    return -torch.log(torch.where(t < 0.5, -torch.log1p(-t), -torch.log(rest)))


def worst(found: Tensor, words: Tensor) -> float:
    wanted = exact(words)
    return float(((found.double() - wanted).abs() / wanted.abs().clamp(min=1.0)).max())


def hard_words() -> Tensor:
    """The ends, the neighbourhoods of every power of two and of the branch, and of the zero of the logarithm at 1/e."""
    spots = [1 << bit for bit in range(33)] + [3 << bit for bit in range(31)]
    spots += [int(p * 2**32) for p in (1 - math.exp(-1), math.exp(-1), 0.25, 1 - math.sqrt(0.5), 0.29289)]
    near = {spot + step for spot in spots for step in range(-40, 41)}
    near |= {2**32 - spot for spot in near}
    return torch.tensor(sorted(word for word in near if 0 <= word < 2**32))


def test_every_hard_word_is_within_a_millionth_of_fp64() -> None:
    words = hard_words()
    assert worst(noise.gumbel_of_words(words), words) < 6e-7


def test_a_sweep_over_all_words_is_within_a_millionth_of_fp64() -> None:
    words = torch.arange(0, 2**32, 4099)
    found = noise.gumbel_of_words(words)
    assert worst(found, words) < 6e-7
    # Planted faults: without the half, and with t rounded before its complement is taken.
    assert worst(noise.gumbel_of_words((words - 1).clamp(min=0)), words) > 6e-7
    t = noise.unit_interval(words)
    assert worst(-torch.log(-torch.log(1.0 - t)), words) > 6e-7


def test_the_noise_falls_as_the_word_rises_but_for_its_rounding() -> None:
    words = torch.arange(0, 2**32, 65521)
    assert float(noise.gumbel_of_words(words).diff().max()) < 1e-6


def test_the_ends_are_finite() -> None:
    ends = noise.gumbel_of_words(torch.tensor([0, 2**32 - 1]))
    assert ends.tolist() == [ends[0], ends[1]]
    assert abs(float(ends[0]) - 33 * math.log(2)) < 3e-6
    assert abs(float(ends[1]) + math.log(33 * math.log(2))) < 1e-6


def kolmogorov(sample: Tensor) -> float:
    """sqrt(n) times the largest distance between the sample's and Gumbel's distribution functions."""
    ordered = sample.double().sort().values
    n = len(ordered)
    cdf = torch.exp(-torch.exp(-ordered))
    ranks = torch.arange(n, dtype=torch.float64)
    distance = torch.maximum((cdf - ranks / n).max(), ((ranks + 1) / n - cdf).max())
    return float(distance) * math.sqrt(n)


def chi_squared(sample: Tensor, bins: int) -> float:
    """Over equally likely bins, in standard deviations from its mean."""
    cdf = torch.exp(-torch.exp(-sample.double()))
    counts = torch.bincount((cdf * bins).long().clamp(0, bins - 1), minlength=bins).double()
    expected = len(sample) / bins
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - (bins - 1)) / math.sqrt(2 * (bins - 1))


def draws() -> dict[str, Tensor]:
    many = torch.arange(200_000)
    return {
        "over ids": noise.gumbel(torch.tensor(17), torch.tensor(3), many),
        "over positions": noise.gumbel(torch.tensor(17), many, torch.tensor(5)),
        "over seeds": noise.gumbel(many, torch.tensor(3), torch.tensor(5)),
        "over far seeds": noise.gumbel(many << 32, torch.tensor(0), torch.tensor(0)),
    }


def test_the_distribution_is_gumbels_along_ids_positions_and_seeds() -> None:
    for name, sample in draws().items():
        assert kolmogorov(sample) < 1.95, name  # exceeded by chance once in a thousand
        assert abs(chi_squared(sample, 200)) < 4, name
        # The planted fault: a scale that is 2 % off.
        assert kolmogorov(sample * 1.02) > 1.95, name


def test_neighbouring_ids_are_uncorrelated() -> None:
    sample = noise.gumbel(torch.tensor(1), torch.tensor(2), torch.arange(200_000)).double()
    for lag in (1, 2, 3, 4, 16, 64):
        pair = torch.corrcoef(torch.stack([sample[lag:], sample[:-lag]]))[0, 1]
        assert abs(float(pair)) * math.sqrt(len(sample)) < 4, lag
