"""Agreement with a teacher: 0 where the student is the teacher, whatever the text, and away from 0 where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.students.latent.agreement import Agreement, agreement
from latentforge.students.latent.bootstrap import ratio
from latentforge.students.latent.brier import roll_out, same_so_far

from .conftest import MarkovSource, uniforms

CONTEXTS = 400


def teacher() -> MarkovSource:
    return MarkovSource.peaked(vocabulary=6, sharpness=1.3, seed=3)


def befores() -> Tensor:
    return teacher().first(torch.arange(CONTEXTS))


def drawn(model: MarkovSource, seed: int, draws: int = 12) -> Tensor:
    seeds = seed * 10**7 + torch.arange(CONTEXTS * draws)
    return model.draw(befores().repeat_interleave(draws), seeds, 4).reshape(CONTEXTS, draws, 4)


def compared(samples: Tensor) -> Agreement:
    return agreement(samples, drawn(teacher(), 1))


def test_a_student_whose_draws_are_the_teachers_is_0_away_within_its_error() -> None:
    found = compared(drawn(teacher(), 2))
    assert abs(found.value) <= 3 * found.error
    assert found.low <= 0 <= found.high
    for distance, error in zip(found.orders, found.order_errors, strict=True):
        assert abs(distance) <= 3 * error


def test_another_model_is_away_from_0() -> None:
    assert compared(drawn(MarkovSource.peaked(vocabulary=6, sharpness=1.3, seed=9), 2)).low > 20


def test_the_distance_is_that_of_the_two_distributions() -> None:
    one, other = teacher(), MarkovSource.peaked(vocabulary=6, sharpness=0.6, seed=3)
    found = compared(drawn(other, 2))
    for order in range(1, 5):
        chunks = torch.cartesian_prod(*[torch.arange(6)] * order).reshape(-1, order)
        wanted = 0.0
        for before in range(6):
            first = torch.full((len(chunks),), before)
            gap = one.probability(first, chunks)[:, -1] - other.probability(first, chunks)[:, -1]
            wanted += float((befores() == before).double().mean() * gap.square().sum())
        assert abs(found.orders[order - 1] - wanted) <= 3.5 * found.order_errors[order - 1]


def test_positions_drawn_by_themselves_are_away_from_0() -> None:
    """The planted fault: each position's own distribution is right, the chunks are not."""
    sums = teacher().marginals()[befores()].cumsum(-1)
    chances = uniforms(10**8 + torch.arange(CONTEXTS)[:, None, None], torch.arange(4), torch.arange(12)[:, None])
    samples = torch.searchsorted(sums, chances.transpose(1, 2).contiguous()).clamp_max(5).transpose(1, 2)
    found = compared(samples)
    assert abs(found.orders[0]) <= 3 * found.order_errors[0]
    assert found.low > 5


def test_a_student_that_says_nothing_is_100_away_and_one_that_is_sure_more() -> None:
    nothing = torch.randint(0, 10**6, (CONTEXTS, 12, 4), generator=torch.Generator().manual_seed(1)) + 6
    found = compared(nothing)
    assert found.value == pytest.approx(100, abs=0.5)
    assert compared(torch.full((CONTEXTS, 12, 4), 7)).value > 300


def test_draws_that_go_on_only_where_they_can_agree_are_measured_the_same() -> None:
    model, reference = teacher(), drawn(teacher(), 1)
    truth = reference[:, 0]

    def draw(contexts: Tensor, after: Tensor, numbers: Tensor) -> Tensor:
        last = after[:, -1] if after.shape[1] else befores()[contexts]
        return model.draw(last, 10**9 * (after.shape[1] + 1) + contexts * 100 + numbers, 1)

    texts = torch.cat([truth[:, None], reference], dim=1)
    found = agreement(roll_out(draw, texts, chunk=1, draws=12), reference)
    assert abs(found.value) <= 3 * found.error
    # Going on beside the text alone loses pairs that agree.
    lost = agreement(roll_out(draw, torch.full_like(truth, -5), chunk=1, draws=12), reference)
    assert lost.orders[3] > found.orders[3]


def test_what_cannot_be_compared_is_refused() -> None:
    good = drawn(teacher(), 1)
    with pytest.raises(RefusedError, match=r"draws of the student are \[400, 1, 4\]"):
        agreement(good[:, :1], good)
    with pytest.raises(RefusedError, match=r"draws of the teacher are \[399, 12, 4\]"):
        agreement(good, good[1:])
    with pytest.raises(RefusedError, match="no two draws of the teacher agree"):
        agreement(good, torch.arange(CONTEXTS * 48).reshape(CONTEXTS, 12, 4))


def test_a_ratio_is_that_of_the_sums_and_its_interval_covers_it() -> None:
    below = torch.arange(1, 201).double()
    found = ratio(2 * below + torch.randn(200, generator=torch.Generator().manual_seed(1)), below)
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(2, abs=0.05)
    with pytest.raises(RefusedError, match="no ratio"):
        ratio(below, torch.zeros(200))


def test_the_pairs_of_many_draws_are_not_compared_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 draws are allowed: 64 contexts of them at once would be 2^32 comparisons."""
    largest = 0

    def watched(left: Tensor, right: Tensor) -> Tensor:
        nonlocal largest
        found = same_so_far(left, right)
        largest = max(largest, found.numel())
        return found

    monkeypatch.setattr("latentforge.students.latent.agreement.same_so_far", watched)
    samples = torch.randint(3, (40, 300, 4))
    agreement(samples, samples.flip(1))
    assert 0 < largest <= 2**22
