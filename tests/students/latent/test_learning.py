"""Chunks that a teacher draws teach what a text of the same contexts cannot, on a source that is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from latentforge.students.latent.agreement import agreement
from latentforge.students.latent.backbone import DecoderShape
from latentforge.students.latent.brier import BrierLM, brier_lm, sample_scores
from latentforge.students.latent.codec import Codec, CodecShape, Posterior, new_codec
from latentforge.students.latent.codec_loss import CodecObjective, codec_loss, noise_of
from latentforge.students.latent.energy import EnergySettings, energy_score
from latentforge.students.latent.noise import head_noise
from latentforge.students.latent.student import EnergySignal, LatentShape, LatentStudent

from .conftest import MarkovSource, uniforms

CHUNK, NOISE, BATCH = 4, 16, 64


@dataclass(frozen=True)
class Task:
    """A source, the codec of its chunks, and how many contexts are known of it."""

    source: MarkovSource
    latent: int
    encode: Callable[[Tensor], Posterior]
    decode: Callable[[Tensor], Tensor]
    contexts: int
    width: int
    energy: EnergySettings
    learning_rate: float

    def beginnings(self, count: int, seed: int) -> Tensor:
        """Chunks int64 [count, K] of the source."""
        seeds = seed * 10**8 + torch.arange(count)
        return self.source.draw(self.source.first(seeds), seeds, CHUNK)

    def continued(self, chunks: Tensor, count: int, seed: int) -> Tensor:
        """``count`` continuations int64 [B, R, K] of chunks [B, K]."""
        seeds = (1 << 40) + seed * 10**8 + torch.arange(len(chunks) * count)
        return self.source.draw(chunks[:, -1].repeat_interleave(count), seeds, CHUNK).unflatten(0, (-1, count))

    def by_position(self, chunks: Tensor, count: int, seed: int) -> Tensor:
        """The planted fault: each position from its own distribution given the context, whatever came before it."""
        shape = (len(chunks), count, CHUNK)
        chances = uniforms(torch.tensor(seed), torch.tensor(5), torch.arange(shape[0] * count * CHUNK)).reshape(shape)
        sums = self.source.marginals(CHUNK)[chunks[:, -1]].cumsum(-1)
        found = torch.searchsorted(sums, chances.transpose(1, 2).contiguous()).transpose(1, 2)
        return found.clamp_max(len(self.source.rows) - 1)


def small() -> Task:
    """Eight tokens; a latent holds a code for each token at its place, as far from each other as can be."""
    codes = torch.nn.init.orthogonal_(torch.empty(8, 8), generator=torch.Generator().manual_seed(1)) * 2.0

    def encode(chunks: Tensor) -> Posterior:
        mean = codes[chunks].flatten(-2)
        return Posterior(mean, torch.full_like(mean, -1.5))

    source = MarkovSource.peaked(vocabulary=8, sharpness=1.0, seed=3)
    return Task(
        source,
        32,
        encode,
        lambda z: (z.unflatten(-1, (CHUNK, 8)) @ codes.T).argmax(-1),
        200,
        32,
        EnergySettings(draws=4, samples=8),
        4e-3,
    )


def known(text: str = "source") -> Task:
    """The source of 32 tokens with a codec that is trained on it, or on "anything", and 2000 contexts."""
    codec: Codec = new_codec(CodecShape(32, CHUNK, 32, 64, 128), seed=1)
    source = MarkovSource.peaked()
    optimiser = torch.optim.AdamW(codec.parameters(), lr=3e-3)
    objective = CodecObjective(0.15, 0.15, 0.001, 0.5)
    for step in range(600):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / 600)
        seeds = step * 10**6 + torch.arange(256)
        if text == "source":
            chunks = source.draw(source.first(seeds), seeds, CHUNK)
        else:
            chunks = (uniforms(seeds[:, None], torch.arange(CHUNK), torch.tensor(3)) * 32).long().clamp_max(31)
        codec_loss(codec, chunks, chunks >= 0, objective, noise_of(1, step)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    codec.requires_grad_(False).eval()

    def encode(chunks: Tensor) -> Posterior:
        found = codec.encode(chunks.flatten(0, -2), chunks.flatten(0, -2) >= 0)
        return Posterior(*(part.unflatten(0, chunks.shape[:-1]) for part in found))

    return Task(
        source,
        32,
        encode,
        lambda z: codec.decode(z.flatten(0, -2)).unflatten(0, z.shape[:-1]),
        2000,
        64,
        EnergySettings(draws=8, samples=32),
        2e-3,
    )


def trained(task: Task, signal: str, steps: int) -> LatentStudent:
    """A student of the same contexts, each with the chunk of its text or with eight that are drawn at each visit."""
    decoder = DecoderShape(1, task.width, 2, 1, 2 * task.width)
    shape = LatentShape(len(task.source.rows), CHUNK, task.latent, decoder, head_blocks=2, noise=NOISE, token_layers=0)
    student = LatentStudent.new(shape, seed=1, energy=task.energy)
    contexts = task.beginnings(task.contexts, seed=1)
    text = task.continued(contexts, 1, seed=2)
    optimiser = torch.optim.AdamW(student.parameters(), lr=task.learning_rate)
    generator = torch.Generator().manual_seed(3)
    draw = {"samples": task.continued, "positions": task.by_position}.get(signal)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = task.learning_rate * (1 - step / steps)
        visited = torch.randint(0, task.contexts, (BATCH,), generator=generator)
        drawn = text[visited] if draw is None else draw(contexts[visited], 8, 3 + step)
        mean, log_std = (part.unsqueeze(1) for part in task.encode(drawn))
        target = EnergySignal(mean, log_std, torch.ones(BATCH, 1, dtype=torch.bool), BATCH)
        chunks = torch.stack([contexts[visited], text[visited, 0]], dim=1)
        student(chunks, chunks >= 0, step * BATCH + torch.arange(BATCH), energy={signal: target}).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return student.eval()


@torch.no_grad()
def drawn_by(student: LatentStudent, chunks: Tensor, draws: int = 12) -> Tensor:
    """Latents [B, S, l] of the chunks after ``chunks`` [B, K]."""
    states = student.states(chunks.unsqueeze(1), chunks.unsqueeze(1) >= 0)[:, 0]
    return student.draw_latents(
        states, head_noise(torch.arange(len(chunks)), torch.ones_like(chunks[:, 0]), draws, NOISE)
    )


def distance(task: Task, student: LatentStudent) -> Tensor:
    """The energy score [2000] of contexts that it has not seen, against eight fresh chunks of each."""
    chunks = task.beginnings(2000, seed=7)
    return energy_score(drawn_by(student, chunks), task.encode(task.continued(chunks, 8, seed=8)).mean)


def quality(task: Task, student: LatentStudent) -> BrierLM:
    """BrierLM on contexts that it has not seen."""
    chunks = task.beginnings(5000, seed=7)
    return brier_lm(sample_scores(task.decode(drawn_by(student, chunks)), task.continued(chunks, 1, seed=8)[:, 0]))


@pytest.mark.slow
def test_continuations_teach_what_a_text_of_the_same_contexts_does_not() -> None:
    """Nor do draws of each position by itself, which lose what the tokens of a chunk have to do with each other."""
    task = small()
    samples, text, positions = (
        distance(task, trained(task, signal, 400)) for signal in ("samples", "text", "positions")
    )
    for other in (text, positions):
        more = other - samples
        assert float(more.mean()) > 4 * float(more.std()) / len(more) ** 0.5


@pytest.mark.soak
def test_on_the_known_source_continuations_are_half_a_point_of_brierlm_above_text() -> None:
    task = known()
    found = {signal: quality(task, trained(task, signal, 3000)) for signal in ("samples", "text")}
    best = 100 * float(task.source.optimum().prod()) ** 0.25
    for signal, one in found.items():
        print(f"{signal}: BrierLM {one.value:.2f} ({one.low:.2f} to {one.high:.2f}) of {best:.2f}")
    assert found["samples"].low > found["text"].high + 0.5


@pytest.mark.soak
def test_positions_drawn_by_themselves_are_caught_by_likelihood_and_by_brierlm_where_the_codec_saw_no_text() -> None:
    """A codec of the text decodes what lies between two chunks as the likelier one, so it mends what was taught."""
    found = {}
    for text in ("source", "anything"):
        task = known(text)
        chunks = task.beginnings(4000, seed=7)
        for signal in ("samples", "positions"):
            student = trained(task, signal, 3000)
            said = task.decode(drawn_by(student, chunks, 16))
            bits = -task.source.rows[said[..., :-1], said[..., 1:]].log2().mean((1, 2))
            away = agreement(said, task.continued(chunks, 16, seed=77))
            score = quality(task, student)
            found[text, signal] = bits, away, score
            print(
                f"codec of {text}, taught {signal}: BrierLM {score.value:.2f} ({score.low:.2f} to {score.high:.2f}), "
                f"{away.value:.1f} % ({away.low:.1f} to {away.high:.1f}) from the source, "
                f"{float(bits.mean()):.2f} bits a token after the first"
            )
        more = found[text, "positions"][0] - found[text, "samples"][0]
        assert float(more.mean()) > 4 * float(more.std()) / len(more) ** 0.5
    joint, alone = found["anything", "samples"], found["anything", "positions"]
    assert joint[1].high < alone[1].low
    assert joint[2].value > alone[2].high
