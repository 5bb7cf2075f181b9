"""The energy head: its start, its draws, two modes, and noise that belongs to a row alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.noise import philox_words, unit_interval
from latentforge.students.latent.energy import energy_score
from latentforge.students.latent.head import EnergyHead
from latentforge.students.latent.noise import TrainingNoise, head_noise

WIDTH, LATENT, NOISE = 32, 2, 8


def head(*, tempered: bool = False, seed: int = 1) -> EnergyHead:
    torch.manual_seed(seed)
    return EnergyHead(width=WIDTH, latent=LATENT, noise=NOISE, blocks=2, tempered=tempered)


def noise(rows: int, samples: int, seed: int = 0) -> Tensor:
    return head_noise(torch.full((rows,), seed), torch.arange(rows), samples, NOISE)


def test_a_fresh_head_draws_zeros_and_its_first_gradient_is_finite() -> None:
    fresh, targets = head(), torch.randn(3, 5, LATENT, generator=torch.Generator().manual_seed(1))
    drawn = fresh(torch.randn(3, WIDTH), noise(3, 4))
    assert drawn.shape == (3, 4, LATENT)
    assert not drawn.any()
    energy_score(drawn, targets).sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in fresh.parameters())
    assert fresh.to_latent.bias.grad is not None
    assert bool(fresh.to_latent.bias.grad.any())


def shares(loss: Callable[[Tensor, Tensor], Tensor], temperature: Tensor | None = None) -> tuple[float, float]:
    """The shares of 1000 draws near each of two equally likely points, of a head that was trained with ``loss``."""
    trained, generator = head(), torch.Generator().manual_seed(2)
    modes = torch.tensor([[2.0, -1.0], [-2.0, 1.0]])
    states = torch.ones(16, WIDTH)
    optimiser = torch.optim.AdamW(trained.parameters(), lr=3e-3)
    for step in range(250):
        targets = modes[torch.randint(0, 2, (16, 8), generator=generator)]
        loss(trained(states, noise(16, 8, seed=step)), targets).backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        drawn = trained(states[:1], noise(1, 1000, seed=999))[0]
    near = (drawn.unsqueeze(1) - modes).norm(dim=-1) < 0.75
    first, second = near.float().mean(0).tolist()
    return first, second


def test_two_modes_are_both_drawn_each_half_of_the_time() -> None:
    first, second = shares(lambda drawn, targets: energy_score(drawn, targets).mean())
    assert 0.4 <= first <= 0.6
    assert 0.4 <= second <= 0.6


def test_control_a_squared_error_draws_neither_mode() -> None:
    assert max(shares(lambda drawn, targets: (drawn - targets).square().mean())) < 0.05


def test_a_temperature_of_one_is_the_same_as_none_and_others_are_not() -> None:
    told, states = head(tempered=True), torch.randn(3, WIDTH)
    torch.nn.init.normal_(told.to_latent.weight)
    plain = told(states, noise(3, 2))
    assert torch.equal(told(states, noise(3, 2), torch.ones(3)), plain)
    assert not torch.allclose(told(states, noise(3, 2), torch.full((3,), 0.5)), plain)


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5, float("nan")])
def test_temperatures_that_no_text_was_drawn_at_are_refused(value: float) -> None:
    with pytest.raises(RefusedError, match=r"temperatures \[.*\] are not in \(0, 1\]"):
        head(tempered=True)(torch.randn(1, WIDTH), noise(1, 1), torch.tensor([value]))


def test_a_head_that_knows_no_temperature_refuses_one() -> None:
    with pytest.raises(RefusedError, match="not trained on tempered text"):
        head()(torch.randn(1, WIDTH), noise(1, 1), torch.tensor([0.5]))


def test_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"noise is \[2, 1, 8\], not \[3, S, 8\]"):
        head()(torch.randn(3, WIDTH), noise(2, 1))


def test_noise_is_uniform_and_a_row_s_own() -> None:
    seeds, positions = torch.tensor([3, 4, 3]), torch.tensor([0, 0, 1])
    found = head_noise(seeds, positions, 5, 2000)
    assert found.shape == (3, 5, 2000)
    assert float(found.min()) >= -0.5
    assert float(found.max()) <= 0.5
    assert abs(float(found.mean())) < 0.01
    assert abs(float(found.var()) - 1 / 12) < 0.002
    assert torch.equal(head_noise(seeds[1:2], positions[1:2], 5, 2000)[0], found[1])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_more_draws_begin_with_the_fewer() -> None:
    many = noise(2, 7)
    assert torch.equal(noise(2, 3), many[:, :3])
    assert torch.equal(head_noise(torch.zeros(2).long(), torch.arange(2), 4, NOISE, first=3), many[:, 3:])


def test_training_noise_of_a_row_does_not_depend_on_its_batch() -> None:
    seeds = torch.tensor([5, 6, 7])
    together = TrainingNoise(seeds, torch.device("cpu"))
    alone = TrainingNoise(seeds[1:2], torch.device("cpu"))
    for _ in range(2):
        uniform, normal = together.uniform([2, 3, 0], 4000), together.normal([0, 3, 1], 4000)
        assert torch.equal(uniform[2:], alone.uniform([3], 4000))
        assert torch.equal(normal[:3], alone.normal([3], 4000))
        assert float(uniform.abs().max()) <= 0.5
        assert abs(float(uniform.var()) - 1 / 12) < 0.005
        assert abs(float(normal.std()) - 1) < 0.02


@pytest.mark.parametrize(("samples", "size", "first"), [(1, 64, 0), (3, 7, 2), (2, 5, 1), (200, 64, 0), (1, 1, 3)])
def test_noise_on_the_host_has_the_bits_of_the_definition(samples: int, size: int, first: int) -> None:
    seeds, positions = torch.tensor([-5, 2**62, 7, -(2**63)]), torch.tensor([0, 3, 2**33 + 1, 2**40])
    numbers = torch.arange(first * size, (first + samples) * size).reshape(samples, size)
    words = philox_words(seeds[:, None, None], positions[:, None, None], (1 << 33) + numbers)
    found = head_noise(seeds, positions, samples, size, first=first)
    assert found.dtype == torch.float32
    assert torch.equal(found, unit_interval(words) - 0.5)
