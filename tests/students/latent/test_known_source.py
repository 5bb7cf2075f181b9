"""A student of a source whose every probability is known: what whole chunks of a teacher teach, and tokens do not."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from latentforge.students.latent.backbone import DecoderShape
from latentforge.students.latent.brier import BrierLM, brier_lm, sample_scores
from latentforge.students.latent.codec import CodecShape
from latentforge.students.latent.energy import EnergySettings
from latentforge.students.latent.evaluate import continuations
from latentforge.students.latent.session import LatentModel
from latentforge.students.latent.student import EnergySignal, LatentShape, LatentStudent

from .conftest import MarkovSource, uniforms

CHUNK, SYMBOLS, EOS, CONTEXTS, DRAWS = 4, 4, 4, 200, 4  # the source never says EOS

Signal = Literal["samples", "independent"]


@pytest.fixture(scope="module")
def source() -> MarkovSource:
    """Its best BrierLM is 33.7; drawing each position by itself cannot have more than 23.2."""
    return MarkovSource.peaked(vocabulary=SYMBOLS, sharpness=1.3, seed=3)


class PlainCodec(nn.Module):
    """A codec without training: a latent is the chunk's tokens one-hot, with noise; the largest of each is read."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = CodecShape(SYMBOLS + 1, CHUNK, latent=CHUNK * SYMBOLS, width=1, inner=1)
        self.record = None
        self.decoder_in = nn.Linear(1, 1)

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        mean = nn.functional.one_hot(tokens, SYMBOLS).flatten(1).float()
        return mean, torch.full_like(mean, math.log(0.2))

    def decode(self, latents: Tensor, *, backend: str) -> Tensor:
        return latents.unflatten(1, (CHUNK, SYMBOLS)).argmax(-1)


def everything(tokens: Tensor) -> Tensor:
    return torch.ones_like(tokens, dtype=torch.bool)


def taught(source: MarkovSource, last: Tensor, signal: Signal, step: int) -> Tensor:
    """Chunks [B, R, K] that follow ``last`` [B]: drawn anew at each visit."""
    seeds = (step + 10**4) * 10**5 + torch.arange(len(last) * DRAWS)
    if signal == "samples":
        return source.draw(last.repeat_interleave(DRAWS), seeds, CHUNK).reshape(-1, DRAWS, CHUNK)
    chances = uniforms(seeds[:, None], torch.arange(CHUNK), torch.tensor(0)).reshape(-1, DRAWS, CHUNK)
    sums = source.marginals()[last].cumsum(-1)
    found = torch.searchsorted(sums, chances.transpose(1, 2).contiguous()).clamp_max(SYMBOLS - 1)
    return found.transpose(1, 2)


def trained(source: MarkovSource, signal: Signal, steps: int = 300, rows: int = 128) -> LatentStudent:
    """On 200 contexts of a chunk each, with ``signal`` for the chunk after it."""
    shape = LatentShape(
        SYMBOLS + 1, CHUNK, CHUNK * SYMBOLS, DecoderShape(1, 48, 2, 1, 96), head_blocks=2, noise=16, token_layers=0
    )
    student = LatentStudent.new(shape, seed=1, energy=EnergySettings(draws=8, samples=8))
    optimiser = torch.optim.AdamW(student.parameters(), lr=5e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 5e-3 * min(1.0, (step + 1) / 20) * (1 - 0.95 * step / steps)
        contexts = torch.randint(0, CONTEXTS, (rows,), generator=generator)
        before = source.draw(source.first(5 * 10**8 + contexts), 6 * 10**8 + contexts, CHUNK)
        after = taught(source, before[:, -1], signal, step)
        mean, log_std = PlainCodec().encode(after.flatten(0, 1))
        many = (rows, 1, after.shape[1], -1)
        energy = EnergySignal(mean.reshape(many), log_std.reshape(many), torch.ones(rows, 1).bool(), rows)
        chunks = torch.stack([before, after[:, 0]], dim=1)
        optimiser.zero_grad()
        student(chunks, everything(chunks), contexts + step * 7919, energy={"signal": energy}).loss.backward()
        optimiser.step()
    return student


def score(source: MarkovSource, student: LatentStudent) -> BrierLM:
    """On 600 contexts that it has not seen."""
    number = torch.arange(600)
    before = source.draw(source.first(2 * 10**9 + number), 2 * 10**9 + number, CHUNK)
    after = source.draw(before[:, -1], 3 * 10**9 + number, CHUNK)
    model = LatentModel(student, PlainCodec(), eos_id=EOS)
    found = continuations(model, torch.stack([before, after], dim=1), draws=16)
    return brier_lm(sample_scores(found.samples, found.truth))


@pytest.mark.slow
def test_chunks_of_a_teacher_teach_the_joint_distribution_and_positions_by_themselves_do_not(
    source: MarkovSource,
) -> None:
    """The same contexts, draws and steps: independent draws stop at their bias, whatever the training."""
    joint = score(source, trained(source, "samples"))
    independent = score(source, trained(source, "independent"))
    best, biased = (100 * float(orders.prod()) ** 0.25 for orders in (source.optimum(), source.independent()))
    assert joint.low < best
    assert independent.low < biased
    assert max(biased, independent.high) < joint.low
