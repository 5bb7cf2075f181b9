"""The energy score: its value, its gradient, what it needs of memory, and that it is a proper score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from latentforge.errors import RefusedError
from latentforge.students.latent.energy import EnergySettings, energy_score, power_distances


def points(*shape: int, seed: int = 1, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(scale).to(dtype)


def naive(drawn: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """The definition, over the tensor of differences; of each pair of different draws."""
    count = drawn.shape[1]
    cross = (drawn.unsqueeze(2) - targets.unsqueeze(1)).norm(dim=-1).pow(alpha).mean((1, 2))
    different = ~torch.eye(count, dtype=torch.bool)
    between = (drawn.unsqueeze(2) - drawn.unsqueeze(1))[:, different].norm(dim=-1).pow(alpha)
    return 2 * cross - between.sum(-1) / (count * (count - 1))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.75])
def test_value_and_gradient_are_those_of_the_definition_in_fp64(alpha: float) -> None:
    drawn, targets = points(3, 5, 7).requires_grad_(), points(3, 11, 7, seed=2)
    found, wanted = energy_score(drawn, targets, alpha), naive(drawn, targets, alpha)
    assert torch.allclose(found, wanted, rtol=1e-12)
    (first,) = torch.autograd.grad(found.sum(), drawn)
    (second,) = torch.autograd.grad(wanted.sum(), drawn)
    assert torch.allclose(first, second, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("away", [0.0, 1000.0])
def test_fp32_is_near_fp64_also_far_from_the_origin(away: float) -> None:
    """Expanding the square there costs all digits unless the points are moved to their middle first."""
    drawn, targets = (points(4, 8, 128) + away).float(), (points(4, 100, 128, seed=2, scale=0.3) + away).float()
    exact = drawn.double().requires_grad_()
    drawn.requires_grad_()
    found, wanted = energy_score(drawn, targets), naive(exact, targets.double(), 1.0)
    assert torch.allclose(found.double(), wanted, rtol=1e-4)
    found.sum().backward()
    wanted.sum().backward()
    assert drawn.grad is not None
    assert exact.grad is not None
    assert torch.allclose(drawn.grad.double(), exact.grad, atol=1e-4 * float(exact.grad.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_distances_and_gradient_are_fp32_under_autocast_and_for_bf16_draws(dtype: torch.dtype) -> None:
    drawn = points(2, 4, 16, dtype=dtype).requires_grad_()
    targets = points(2, 6, 16, seed=2, dtype=torch.float32)
    exact = drawn.detach().double().requires_grad_()
    wanted = naive(exact, targets.double(), 1.0)
    wanted.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = energy_score(drawn, targets)
        direct = power_distances(drawn.detach().float(), targets, 1.0)
        found.sum().backward()
    assert found.dtype == direct.dtype == torch.float32
    assert torch.allclose(found.double(), wanted, rtol=1e-5)
    assert torch.allclose(direct.double(), torch.cdist(exact.detach(), targets.double()), rtol=1e-5)
    assert drawn.grad is not None
    assert exact.grad is not None
    assert torch.allclose(drawn.grad.double(), exact.grad, atol=1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("alpha", [0.75, 1.0, 1.5])
@pytest.mark.parametrize("where", [0.0, 0.1, 12345.678])
def test_the_gradient_is_finite_where_all_draws_coincide(alpha: float, where: float) -> None:
    """An untrained head's draws are all the same; three of them, so that their mean is rounded."""
    drawn = torch.full((2, 3, 5), where, requires_grad=True)
    targets = torch.cat([drawn.detach()[:, :1], points(2, 4, 5, dtype=torch.float32)], dim=1)
    score = energy_score(drawn, targets, alpha)
    score.sum().backward()
    assert drawn.grad is not None
    assert bool(drawn.grad.isfinite().all())
    assert bool(score.isfinite().all())


def test_control_a_hand_written_root_has_no_gradient_there() -> None:
    drawn = torch.zeros(1, 3, 5, requires_grad=True)
    (drawn.unsqueeze(2) - drawn.unsqueeze(1)).square().sum(-1).sqrt().sum().backward()
    assert drawn.grad is not None
    assert not drawn.grad.isfinite().any()


def test_points_nearer_than_fp32_can_tell_pull_no_harder_than_others() -> None:
    """The slope of |x|^1 is 1 at most: a rounded distance must not make more of it."""
    targets = points(1, 50, 3, dtype=torch.float32)
    for distance in (1e-7, 1e-5, 1e-4, 1e-3, 1e-2):
        drawn = (targets[:, :1] + distance / math.sqrt(3)).requires_grad_()
        power_distances(drawn, targets[:, :1] * 1.0, 1.0).sum().backward()
        near = drawn.detach().clone().requires_grad_()
        power_distances(near, targets, 1.0)[:, :, 0].sum().backward()
        for found in (drawn.grad, near.grad):
            assert found is not None
            assert float(found.norm()) < 1.5


def allocated(call: Callable[[], None]) -> int:
    """Most bytes that torch held at one time in ``call`` beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None
    roots = list(recorded.profiler.kineto_results.experimental_event_tree())
    events = [e for root in roots for e in flat(root)]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_time_ns):
        held += event.extra_fields.alloc_size
        most = max(most, held)
    assert most > 0
    return most


def flat(event: Any) -> Iterator[Any]:
    """The allocations below an event."""
    if event.name == "[memory]":
        yield event
    for child in event.children:
        yield from flat(child)


def test_no_tensor_of_differences_is_made() -> None:
    rows, draws, samples, size = 16, 8, 100, 128
    drawn, targets = (
        points(rows, draws, size, dtype=torch.float32).requires_grad_(),
        points(rows, samples, size).float(),
    )
    differences = 4 * rows * draws * samples * size
    peak = allocated(lambda: energy_score(drawn, targets).sum().backward())
    # Arguments moved to their middle, pairs a few times; a sixteenth of the differences in all.
    assert 4 * rows * samples * size <= peak < differences / 3
    planted = allocated(lambda: naive(drawn, targets, 1.0).sum().backward())
    assert planted > differences


def test_the_estimate_is_unbiased_for_two_draws_and_one_sample() -> None:
    """Against the enumerated value over a finite set, for a head that is not the target."""
    places = points(4, 3, seed=3)
    head, target = torch.tensor([0.5, 0.3, 0.1, 0.1]).double(), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    distance = torch.cdist(places, places)
    exact = float(2 * head @ distance @ target - head @ distance @ head)
    generator, rows = torch.Generator().manual_seed(4), 200_000
    drawn = places[torch.multinomial(head.expand(rows, 4), 2, replacement=True, generator=generator)]
    samples = places[torch.multinomial(target.expand(rows, 4), 1, replacement=True, generator=generator)]
    found = energy_score(drawn, samples)
    error = float(found.std()) / math.sqrt(rows)
    assert abs(float(found.mean()) - exact) < 4 * error
    # Counting a draw with itself as a pair, as a plain mean does, is 20 errors away.
    biased = float(2 * power_distances(drawn, samples, 1.0).mean() - power_distances(drawn, drawn, 1.0).mean())
    assert abs(biased - exact) > 20 * error


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.9])
def test_the_score_is_lowest_where_the_head_is_the_target(alpha: float) -> None:
    """Heads that are shifted, narrower, wider, the mean alone, or of independent coordinates score worse."""
    rows, draws = 100, 60

    def coordinates(seed: int, scale: float = 1.0) -> Tensor:
        return points(rows, draws, 1, seed=seed, scale=scale)

    def pair(seed: int) -> Tensor:
        """Two coordinates of which the second is the first and a little of its own."""
        first = coordinates(seed)
        return torch.cat([first, first + coordinates(seed + 1, 0.2)], dim=-1)

    def score(drawn: Tensor) -> float:
        return float(energy_score(drawn, pair(10), alpha).mean())

    same = pair(20)
    independent = torch.cat([coordinates(20), coordinates(30, math.sqrt(1.04))], dim=-1)
    for worse in (same + 0.3, same * 0.7, same * 1.4, same * 0.0, independent):
        assert score(worse) > score(same) + 0.003


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"alpha": 2.0}, "alpha = 2"),
        ({"alpha": 0.0}, "alpha = 0"),
        ({"draws": 1}, "draws = 1"),
        ({"samples": 0}, "= 0"),
    ],
)
def test_settings_that_are_no_proper_score_are_refused(settings: dict[str, float], named: str) -> None:
    with pytest.raises(RefusedError, match=named):
        EnergySettings(**settings)  # type: ignore[arg-type]


def test_draws_of_other_rows_than_the_targets_are_refused() -> None:
    with pytest.raises(RefusedError, match=r"\[2, 3, 4\] and targets \[1, 3, 4\]"):
        energy_score(points(2, 3, 4), points(1, 3, 4))
