"""What a codec does to text that it was not trained on: accuracy, also under noise, and what its dimensions tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.linear import linear_kd_loss
from latentforge.students.causal import IGNORE
from latentforge.students.latent.codec import Codec
from latentforge.students.latent.codec_loss import kl_by_dimension, noise_of

NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7)
"""Noise on the latents at which accuracy is reported, as shares of their standard deviation."""

COLLAPSED = 0.01
"""A dimension whose held-out KL is below so many nats tells nothing of its chunk."""

Chunks = tuple[Tensor, Tensor]
"""Chunks int64 [N, K], and which of their places hold a token, bool [N, K]."""


@dataclass(frozen=True)
class CodecReport:
    """A codec on ``tokens`` held-out tokens in ``chunks`` chunks; padding is in none of the figures.

    ``loss`` nats a token at the posterior's mean; accuracies are shares of tokens, and of chunks whose every token is
    right; ``noisy_accuracy`` by level: token accuracy where each number of a latent has normal noise of that share of
    ``latent_std`` (root of the mean variance of the means); ``posterior_std`` the mean of the posterior's own;
    ``kl`` nats by dimension, ``collapsed`` those dimensions below :data:`COLLAPSED`.
    """

    tokens: int
    chunks: int
    loss: float
    token_accuracy: float
    chunk_accuracy: float
    noisy_accuracy: dict[float, float]
    latent_std: float
    posterior_std: float
    kl: tuple[float, ...]

    @property
    def collapsed(self) -> tuple[int, ...]:
        """The dimensions that tell nothing; a KL that is no number is one of them."""
        return tuple(number for number, value in enumerate(self.kl) if not value >= COLLAPSED)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON writes it."""
        return {
            "tokens": self.tokens,
            "chunks": self.chunks,
            "loss": self.loss,
            "token_accuracy": self.token_accuracy,
            "chunk_accuracy": self.chunk_accuracy,
            "noisy_accuracy": {f"{level:g}": value for level, value in self.noisy_accuracy.items()},
            "latent_std": self.latent_std,
            "posterior_std": self.posterior_std,
            "kl": list(self.kl),
            "collapsed": list(self.collapsed),
        }


@torch.no_grad()
def report_codec(
    codec: Codec,
    batches: Callable[[], Iterable[Chunks]],
    *,
    at_most: int | None = None,
    backend: str = "auto",
    decode_backend: str = "auto",
) -> CodecReport:
    """The report of a codec over held-out chunks; ``batches`` is called twice and gives the same ones each time.

    No pass has more than ``at_most`` chunks (None: those of a batch). Noise is that of a batch, and what is counted is
    the same, however small the passes are; means are sums in another order. ``backend`` computes the loss,
    ``decode_backend`` decodes. RefusedError where there is no token.
    """
    codec.eval()
    latent = codec.shape.latent
    total, squares, kl = (torch.zeros(latent, dtype=torch.float64) for _ in range(3))
    spread, tokens, chunks, loss = 0.0, 0, 0, 0.0
    parts = (part for batch in batches() for part in _passes(*batch, at_most))
    for ids, valid in parts:
        text = valid.any(-1)
        posterior = codec.encode(ids[text], valid[text])
        mean = posterior.mean.double()
        total += mean.sum(0).cpu()
        squares += mean.square().sum(0).cpu()
        kl += kl_by_dimension(posterior).double().sum(0).cpu()
        spread += float(posterior.log_std.exp().mean(-1).double().sum())
        tokens += int(valid.sum())
        chunks += int(text.sum())
        loss += float(_cross_entropy(codec, posterior.mean, ids[text].masked_fill(~valid[text], IGNORE), backend))
    if tokens == 0:
        raise RefusedError("there is no held-out token to report on")
    variance = squares / chunks - (total / chunks).square()
    latent_std = float(variance.mean().clamp_min(0.0).sqrt())

    levels = (0.0, *NOISE_LEVELS)
    right, whole = dict.fromkeys(levels, 0), 0
    draws = {level: noise_of(0, number) for number, level in enumerate(levels)}
    for ids, valid in batches():
        text = valid.any(-1)
        chosen, places = ids[text], valid[text]
        mean = torch.cat([codec.encode(*part).mean for part in _passes(chosen, places, at_most)])
        for level in levels:
            noise = torch.randn(mean.shape, generator=draws[level]).to(mean.device) if level else 0.0
            noisy = (mean + level * latent_std * noise).split(_size(mean, at_most))
            same = torch.cat([codec.decode(part, backend=decode_backend) for part in noisy]) == chosen
            right[level] += int((same & places).sum())
            if level == 0.0:
                whole += int((same | ~places).all(-1).sum())
    return CodecReport(
        tokens=tokens,
        chunks=chunks,
        loss=loss / tokens,
        token_accuracy=right[0.0] / tokens,
        chunk_accuracy=whole / chunks,
        noisy_accuracy={level: right[level] / tokens for level in NOISE_LEVELS},
        latent_std=latent_std,
        posterior_std=spread / chunks,
        kl=tuple((kl / chunks).tolist()),
    )


def _passes(ids: Tensor, valid: Tensor, at_most: int | None) -> Iterator[Chunks]:
    """A batch's chunks in parts of at most so many."""
    yield from zip(ids.split(_size(ids, at_most)), valid.split(_size(valid, at_most)), strict=True)


def _size(batch: Tensor, at_most: int | None) -> int:
    return at_most or max(1, len(batch))


def _cross_entropy(codec: Codec, latents: Tensor, labels: Tensor, backend: str) -> Tensor:
    """The sum over labelled tokens, nats."""
    return linear_kd_loss(
        codec.hidden(latents).flatten(0, 1),
        codec.output_weight,
        None,
        labels.flatten(),
        temperature=1.0,
        ce_weight=1.0,
        kd_weight=0.0,
        denominator=1.0,
        ignore_index=IGNORE,
        backend=backend,
    ).ce
