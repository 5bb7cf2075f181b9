"""A codec knows the chunks of its text: what it decodes between two of them is the likelier one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentforge.students.latent.codec import Codec, CodecShape, new_codec
from latentforge.students.latent.codec_loss import CodecObjective, codec_loss, noise_of

from .conftest import MarkovSource, uniforms

SYMBOLS, CHUNK, STEPS = 12, 4, 80


def source() -> MarkovSource:
    return MarkovSource.peaked(vocabulary=SYMBOLS, sharpness=1.2, seed=3)


def chunks_of(text: str, count: int, seed: int) -> Tensor:
    seeds = seed * 10**7 + torch.arange(count)
    if text == "source":
        return source().draw(source().first(seeds), seeds, CHUNK)
    return (uniforms(seeds[:, None], torch.arange(CHUNK), torch.tensor(7)) * SYMBOLS).long().clamp_max(SYMBOLS - 1)


def trained(text: str) -> Codec:
    codec = new_codec(CodecShape(SYMBOLS, CHUNK, 32, 48, 96), seed=1)
    optimiser = torch.optim.AdamW(codec.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 - step / STEPS)
        chunks = chunks_of(text, 128, step)
        loss = codec_loss(codec, chunks, chunks >= 0, CodecObjective(0.15, 0.15, 0.001, 0.5), noise_of(1, step))
        loss.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return codec.eval()


def likelihood(chunks: Tensor) -> float:
    """Mean log-probability of the tokens after the first, given the one before each."""
    return float(source().rows[chunks[:, :-1], chunks[:, 1:]].log().mean())


@torch.no_grad()
def decoded(codec: Codec, chunks: Tensor, noise: float = 0.0) -> Tensor:
    """What comes of their latents, with ``noise`` on each of their numbers as a share of its standard deviation."""
    latents = codec.encode(chunks, chunks >= 0).mean
    random = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    return codec.decode(latents + noise * latents.std(0) * random)


@pytest.mark.slow
def test_positions_drawn_by_themselves_come_out_of_a_codec_of_the_text_as_if_drawn_together() -> None:
    """So a student's score cannot tell them apart where the codec does: a codec that saw no text does not."""
    seeds = 10**9 + torch.arange(3000)
    before = source().first(seeds)
    sums = source().marginals()[before].cumsum(-1)
    chances = uniforms(seeds[:, None], torch.arange(CHUNK), torch.tensor(9))
    positions = torch.searchsorted(sums, chances.unsqueeze(-1)).squeeze(-1).clamp_max(SYMBOLS - 1)
    together = source().draw(before, seeds + 10**6, CHUNK)
    gained = {}
    for text in ("source", "anything"):
        codec = trained(text)
        own = chunks_of(text, 3000, 10**6)
        assert float((decoded(codec, own) == own).double().mean()) > 0.9
        gained[text] = likelihood(decoded(codec, positions, noise=0.5)) - likelihood(positions)
    apart = likelihood(together) - likelihood(positions)
    assert gained["source"] > 0.15 * apart
    assert gained["anything"] < 0.02 * apart
