"""Distributions that are known exactly, for what can only be measured by drawing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from latentforge.kernels.noise import gumbel, philox_words, unit_interval
from latentforge.students.latent.backbone import DecoderShape
from latentforge.students.latent.codec import Codec, CodecShape
from latentforge.students.latent.session import LatentModel
from latentforge.students.latent.student import LatentShape, LatentStudent

VOCABULARY, EOS, LATENT = 40, 0, 6


def untrained_model(chunk: int = 4, *, cache: bool = True, **words: Any) -> LatentModel:
    """Weights are random, but spread so that texts differ: draws, seeds and contexts all matter."""
    shape = LatentShape(VOCABULARY, chunk, LATENT, DecoderShape(2, 32, 4, 2, 48), head_blocks=1, noise=8, **words)
    student = LatentStudent.new(shape, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        codec = Codec(CodecShape(VOCABULARY, chunk, LATENT, 16, 24))
    with torch.no_grad():
        student.head.to_latent.weight.normal_(std=1.0, generator=generator)
        student.table.weight.normal_(std=0.2, generator=generator)
        # At first the chunks before the last hardly change a state, and a state hardly changes a draw.
        for weight in (*student.head.blocks.parameters(), *student.backbone.decoder.parameters()):
            weight.mul_(4)
        for weight in (codec.embedding.weight, codec.decoder_in.weight, codec.decoder_split.weight):
            weight.normal_(std=0.5, generator=generator)
        codec.embedding.weight[EOS] *= 0.3
        if student.head.from_temperature is not None:
            student.head.from_temperature.weight.normal_(generator=generator)
    return LatentModel(student, codec, eos_id=EOS, cache=cache)


def uniforms(seeds: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
    """Numbers in (0, 1), fp64, keyed by broadcast int64 tensors."""
    return unit_interval(philox_words(seeds, positions, numbers)).double()


@dataclass
class KnownDraws:
    """A sampler of M outcomes with known probabilities, [M]; outcome i is the chunk (i, i + 1). It counts its draws."""

    probabilities: Tensor
    seeds: Tensor
    made: int = field(default=0)

    def __call__(self, rows: Tensor, first: int, count: int) -> Tensor:
        self.made += len(rows) * count
        numbers = torch.arange(first, first + count)
        found = uniforms(self.seeds[rows][:, None], torch.tensor(11), numbers[None])
        outcomes = torch.searchsorted(self.probabilities.double().cumsum(0), found).clamp_max(
            len(self.probabilities) - 1
        )
        return torch.stack([outcomes, outcomes + 1], dim=-1)


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Of the chi-square test that ``counts`` [M] were drawn from ``probabilities`` [M]; rare outcomes are one cell."""
    expected = counts.sum() * probabilities.double() / probabilities.double().sum()
    common = expected >= 5
    seen = torch.cat([counts[common].double(), counts[~common].sum().double()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    if wanted[-1] < 5:  # too rare even together: with the next rarest
        order = wanted[:-1].argsort()
        seen[order[0]] += seen[-1]
        wanted[order[0]] += wanted[-1]
        seen, wanted = seen[:-1], wanted[:-1]
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2.0).double(), statistic / 2))


@dataclass(frozen=True)
class MarkovSource:
    """Text whose next token depends on the last one alone, by ``rows`` fp64 [V, V]: all is known exactly."""

    rows: Tensor

    @classmethod
    def peaked(cls, vocabulary: int = 32, sharpness: float = 0.8825, seed: int = 4) -> MarkovSource:
        """Rows softmax(sharpness g) of Gumbel noise g. By these defaults BrierLM cannot exceed 5.24 (V = 32, K = 4)."""
        ids = torch.arange(vocabulary)
        noise = gumbel(torch.tensor(seed), ids[:, None], ids[None]).double()
        return cls((sharpness * noise).softmax(-1))

    def tempered(self, temperature: float) -> MarkovSource:
        """The source of which each token is drawn at that temperature, given the one before it."""
        rows = self.rows ** (1 / temperature)
        return MarkovSource(rows / rows.sum(-1, keepdim=True))

    def collisions(self, shares: Tensor, orders: int = 4) -> Tensor:
        """How often two draws agree in their first 1 .. n tokens, fp64 [n], after tokens by ``shares`` [V]."""
        agree, found = torch.ones(len(self.rows), dtype=torch.float64), []
        for _ in range(orders):
            agree = (self.rows**2) @ agree
            found.append(shares @ agree)
        return torch.stack(found)

    def stationary(self) -> Tensor:
        """Shares of the tokens in long texts, fp64 [V]."""
        return torch.linalg.matrix_power(self.rows, 4096)[0]

    def draw(self, before: Tensor, seeds: Tensor, length: int) -> Tensor:
        """int64 [R, length]: a continuation of ``before`` [R] by each of ``seeds`` [R]."""
        sums, found = self.rows.cumsum(-1), [before]
        for position in range(length):
            chances = uniforms(seeds, torch.tensor(position), torch.tensor(0))
            follow = torch.searchsorted(sums[found[-1]], chances[:, None]).squeeze(-1)
            found.append(follow.clamp_max(len(self.rows) - 1))
        return torch.stack(found[1:], dim=-1)

    def first(self, seeds: Tensor) -> Tensor:
        """int64 [R]: tokens from the stationary distribution."""
        return torch.searchsorted(self.stationary().cumsum(0), uniforms(seeds, torch.tensor(-1), torch.tensor(0)))

    def probability(self, before: Tensor, chunks: Tensor) -> Tensor:
        """fp64 [R, n]: that ``before`` [R] is followed by the first 1 .. n tokens of ``chunks`` int64 [R, n]."""
        path = torch.cat([before[:, None], chunks], dim=1)
        return self.rows[path[:, :-1], path[:, 1:]].cumprod(-1)

    def optimum(self, orders: int = 4) -> Tensor:
        """B1 .. Bn of the source itself, fp64 [n]: the expected probability of what it says."""
        return self.collisions(self.stationary(), orders)

    def marginals(self, orders: int = 4) -> Tensor:
        """fp64 [V, n, V]: position j's distribution after each token, whatever the tokens between are."""
        return torch.stack([torch.linalg.matrix_power(self.rows, j) for j in range(1, orders + 1)], dim=1)

    def independent(self, orders: int = 4, power: float = 1.0) -> Tensor:
        """B1 .. Bn, fp64 [n], of a model that draws each position by itself: 2 sum P Q - sum Q^2, Q its product.

        With a ``power`` above 1 each position is sharper than it is in the text.
        """
        marginals = self.marginals(orders) ** power
        marginals = marginals / marginals.sum(-1, keepdim=True)
        path, square, found = torch.eye(len(self.rows)).double(), torch.ones(len(self.rows)).double(), []
        for j in range(orders):
            path = (path @ self.rows) * marginals[:, j]
            square = square * (marginals[:, j] ** 2).sum(-1)
            found.append(self.stationary() @ (2 * path.sum(-1) - square))
        return torch.stack(found)
