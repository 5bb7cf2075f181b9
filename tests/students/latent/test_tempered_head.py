"""One draw at a temperature below 1, of a head that was taught it: as sharp as the source is there, and no sharper."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from latentforge.students.latent.backbone import DecoderShape
from latentforge.students.latent.brier import same_so_far
from latentforge.students.latent.codec import Posterior
from latentforge.students.latent.energy import EnergySettings
from latentforge.students.latent.noise import head_noise
from latentforge.students.latent.student import EnergySignal, LatentShape, LatentStudent

from .conftest import MarkovSource
from .test_learning import CHUNK, Task, known

COLD, NOISE = 0.5, 16


class Sharpness(NamedTuple):
    """How often two draws agree, and how often one agrees with a draw of the source at that temperature, in the first
    1 .. 4 tokens: as shares of what two draws of the source do, fp64 [4]."""

    collision: Tensor
    accuracy: Tensor


def plain() -> Task:
    """Four tokens; a latent is a chunk's tokens, one-hot."""

    def encode(chunks: Tensor) -> Posterior:
        mean = torch.nn.functional.one_hot(chunks, 4).flatten(-2).float()
        return Posterior(mean, torch.full_like(mean, -3.0))

    def decode(latents: Tensor) -> Tensor:
        return latents.unflatten(-1, (CHUNK, 4)).argmax(-1)

    source = MarkovSource.peaked(vocabulary=4, sharpness=1.3, seed=3)
    return Task(source, 16, encode, decode, 200, 48, EnergySettings(draws=8, samples=8), 5e-3)


def taught(task: Task, steps: int, batch: int) -> LatentStudent:
    """By what the source says at temperature 1 and at ``COLD``, of the same contexts."""
    decoder = DecoderShape(1, task.width, 2, 1, 2 * task.width)
    shape = LatentShape(
        len(task.source.rows), CHUNK, task.latent, decoder, head_blocks=2, noise=NOISE, token_layers=0, tempered=True
    )
    student = LatentStudent.new(shape, seed=1, energy=task.energy)
    optimiser = torch.optim.AdamW(student.parameters(), lr=task.learning_rate)
    generator = torch.Generator().manual_seed(3)
    contexts = task.beginnings(task.contexts, seed=1)
    given, warm_up = torch.ones(batch, 1, dtype=torch.bool), min(50, steps // 10)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = task.learning_rate * min(1, (step + 1) / warm_up) * (1 - step / steps)
        some = contexts[torch.randint(0, task.contexts, (batch,), generator=generator)]
        energy = {}
        for name, source, seed, told in (
            ("plain", task.source, 3 + step, None),
            ("tempered", task.source.tempered(COLD), 3 + step + 10**5, torch.full((batch, 1), COLD)),
        ):
            mean, log_std = (part.unsqueeze(1) for part in task.encode(drawn(source, some, 8, seed)))
            energy[name] = EnergySignal(mean, log_std, given, batch, temperature=told)
        chunks = torch.stack([some, some], dim=1)
        student(chunks, chunks >= 0, step * batch + torch.arange(batch), energy=energy).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return student.eval()


def drawn(source: MarkovSource, chunks: Tensor, count: int, seed: int) -> Tensor:
    """``count`` continuations int64 [B, R, K] of chunks [B, K]."""
    seeds = (1 << 40) + seed * 10**8 + torch.arange(len(chunks) * count)
    return source.draw(chunks[:, -1].repeat_interleave(count), seeds, CHUNK).unflatten(0, (-1, count))


@torch.no_grad()
def sharpness(task: Task, student: LatentStudent, temperature: float, contexts: int = 2000) -> Sharpness:
    """Of one draw of each of 16 noises, after contexts that it has not seen."""
    chunks = task.beginnings(contexts, seed=7)
    states = student.states(chunks.unsqueeze(1), chunks.unsqueeze(1) >= 0)[:, 0]
    noise = head_noise(torch.arange(contexts), torch.ones_like(chunks[:, 0]), 16, NOISE)
    found = task.decode(student.draw_latents(states, noise, torch.full((contexts,), temperature)))
    source = task.source if temperature == 1 else task.source.tempered(temperature)
    other = drawn(source, chunks, 16, 10**6)
    best = source.collisions(task.source.stationary())
    alike = (same_so_far(found[:, :, None], found[:, None]).double().sum((1, 2)) - 16) / (16 * 15)
    agree = same_so_far(found[:, :, None], other[:, None]).double().mean((1, 2))
    return Sharpness(alike.mean(0) / best, agree.mean(0) / best)


@pytest.mark.slow
def test_one_draw_at_a_low_temperature_is_sharper_than_at_1_and_about_as_sharp_as_the_source_there() -> None:
    """Collision and accuracy both: a head that has collapsed on one chunk collides always, and is seldom right."""
    task = plain()
    student = taught(task, steps=200, batch=64)
    cold = sharpness(task, student, COLD)
    assert all(0.6 < share < 1.5 for share in cold.collision.tolist())
    assert all(0.75 < share < 1.25 for share in cold.accuracy.tolist())
    warm = sharpness(task, student, 1.0)
    best = task.source.tempered(COLD).collisions(task.source.stationary())
    for name in ("collision", "accuracy"):
        told = getattr(cold, name) * best
        untold = getattr(warm, name) * task.source.optimum()
        assert bool((told > 1.2 * untold).all())


@pytest.mark.soak
def test_on_the_known_source_one_draw_at_t_half_collides_as_often_as_the_source_there_within_10_percent() -> None:
    task = known()
    student = taught(task, steps=3000, batch=64)
    for temperature in (COLD, 1.0):
        found = sharpness(task, student, temperature, contexts=4000)
        for name, shares in found._asdict().items():
            print(f"T = {temperature}: {name}, as shares of the source's:", [round(x, 3) for x in shares.tolist()])
        if temperature == COLD:
            cold = found
    assert 0.9 < float(cold.collision[-1]) < 1.1
    assert float(cold.accuracy[-1]) > 0.9
