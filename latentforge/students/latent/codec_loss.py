"""What a codec is trained on: its tokens' cross-entropy, and the clipped KL of its latents to a standard normal."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentforge.kernels.linear import linear_kd_loss
from latentforge.students.causal import IGNORE
from latentforge.students.latent.codec import Codec, Posterior


@dataclass(frozen=True)
class CodecObjective:
    """The parts of the loss and the noise under which it is taken.

    ``token_dropout`` is the share of the tokens that the encoder is not shown, ``latent_dropout`` of the latent's
    numbers that the decoder is not; ``kl_floor`` (nats) is what each dimension may tell at no cost.
    """

    token_dropout: float
    latent_dropout: float
    kl_weight: float
    kl_floor: float
    kernel_backend: str = "auto"


class CodecLoss(NamedTuple):
    """The loss of a batch: K · ``ce`` + kl_weight · ``kl``.

    ``ce`` is the mean over its tokens in nats a token, ``kl`` the mean of the clipped sum over the chunks that hold a
    token, in nats a chunk; scalar tensors, fp32. Of a part of a batch they are its share of these means, and ``rows``
    tokens and ``chunks`` are those of the part.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    rows: int
    chunks: int


def kl_by_dimension(posterior: Posterior) -> Tensor:
    """KL of each latent to a standard normal, by dimension: fp32 [N, l], nats."""
    mean, log_std = posterior
    return 0.5 * (mean.square() + (2.0 * log_std).exp() - 1.0 - 2.0 * log_std)


def noise_of(seed: int, step: int) -> torch.Generator:
    """The generator of a step's noise, a function of ``seed`` and ``step`` alone: a resumed run draws the same."""
    key = hashlib.sha256(f"codec noise {seed} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)


class CodecNoise(NamedTuple):
    """What is drawn for N chunks: which tokens the encoder is shown, bool [N, K]; the posterior's own noise, fp32
    [N, l]; which numbers of a latent the decoder is shown, bool [N, l]."""

    shown: Tensor
    normal: Tensor
    kept: Tensor

    @classmethod
    def drawn(cls, tokens: Tensor, latent: int, objective: CodecObjective, generator: torch.Generator) -> CodecNoise:
        """That of a whole batch int64 [N, K], on its device: a part of it has the same, whoever trains it."""
        shape = (len(tokens), latent)
        shown = torch.rand(tokens.shape, generator=generator) >= objective.token_dropout
        normal = torch.randn(shape, generator=generator)
        kept = torch.rand(shape, generator=generator) >= objective.latent_dropout
        return cls(*(one.to(tokens.device) for one in (shown, normal, kept)))

    def of(self, chunks: slice) -> CodecNoise:
        """That of some of the chunks."""
        return CodecNoise(*(one[chunks] for one in self))


class Counted(NamedTuple):
    """The tokens of a whole optimiser step, and its chunks that hold one: what its means are over."""

    tokens: int
    chunks: int

    @classmethod
    def of(cls, valid: Tensor) -> Counted:
        """Those of chunks whose text is where ``valid`` bool [N, K]."""
        return cls(int(valid.sum()), int(valid.any(-1).sum()))


def codec_loss(
    codec: Codec, tokens: Tensor, valid: Tensor, objective: CodecObjective, generator: torch.Generator
) -> CodecLoss:
    """The loss of chunks int64 [N, K] whose text is where ``valid`` bool [N, K], as one whole batch."""
    noise = CodecNoise.drawn(tokens, codec.shape.latent, objective, generator)
    return share_of_loss(codec, tokens, valid, objective, noise, Counted.of(valid))


def share_of_loss(
    codec: Codec, tokens: Tensor, valid: Tensor, objective: CodecObjective, noise: CodecNoise, step: Counted
) -> CodecLoss:
    """What chunks int64 [N, K] with their ``noise`` add to the loss of a ``step`` that counts so many tokens and
    chunks; nothing of the size [N·K, V] is made.

    Padding has no part in it: a chunk without a token changes neither mean. Labels are the tokens as they are, those
    that the encoder was not shown too.
    """
    posterior = codec.encode(tokens, valid & noise.shown)
    latents = posterior.mean + noise.normal * posterior.log_std.exp()
    latents = latents * noise.kept / (1.0 - objective.latent_dropout)
    rows, text = int(valid.sum()), valid.any(-1)
    chunks = int(text.sum())
    ce = linear_kd_loss(
        codec.hidden(latents).flatten(0, 1),
        codec.output_weight,
        None,
        tokens.masked_fill(~valid, IGNORE).flatten(),
        temperature=1.0,
        ce_weight=1.0,
        kd_weight=0.0,
        denominator=max(step.tokens, 1),
        ignore_index=IGNORE,
        backend=objective.kernel_backend,
    ).loss
    clipped = kl_by_dimension(posterior).clamp_min(objective.kl_floor).sum(-1)
    kl = (clipped * text).sum() / max(step.chunks, 1)
    return CodecLoss(codec.shape.chunk * ce + objective.kl_weight * kl, ce.detach(), kl.detach(), rows, chunks)


class CodecTraining(nn.Module):
    """A codec whose ``forward`` is its loss, as whatever wraps it asks of what it trains."""

    def __init__(self, codec: Codec, objective: CodecObjective) -> None:
        super().__init__()
        self.codec = codec
        self.objective = objective

    def forward(self, tokens: Tensor, valid: Tensor, noise: CodecNoise, step: Counted) -> CodecLoss:
        """:func:`share_of_loss` of some chunks."""
        return share_of_loss(self.codec, tokens, valid, self.objective, noise, step)

    def layers(self) -> list[nn.Module]:
        """What every pass calls as one, in this order; the rest is used by itself."""
        codec = self.codec
        return [codec.encoder_token, codec.encoder_chunk, codec.decoder_chunk, codec.decoder_token]
