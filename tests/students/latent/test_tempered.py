"""Low temperatures without probabilities: the distributions are right, and depend on seeds alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentforge.errors import FailedError, RefusedError
from latentforge.students.latent.tempered import Drawn, exact, expected_draws, vote

from .conftest import KnownDraws, p_value

ROWS = 3000


def twenty() -> Tensor:
    weights = 1.0 / torch.arange(1, 21).double()
    return weights / weights.sum()


def seeds(rows: int = ROWS, start: int = 0) -> Tensor:
    return torch.arange(start, start + rows)


def zeros(rows: int = ROWS) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64)


def accepted(temperature: float, rows: int = ROWS, **settings: int) -> Drawn:
    draw = KnownDraws(twenty(), seeds(rows))
    return exact(draw, temperature=temperature, seeds=seeds(rows), positions=zeros(rows), **settings).checked(
        temperature
    )


def counts(drawn: Drawn) -> Tensor:
    return torch.bincount(drawn.chunks[:, 0], minlength=20)


@pytest.mark.parametrize("temperature", [0.4, 0.5, 0.7, 1.0])
def test_rejection_draws_from_the_sharpened_distribution(temperature: float) -> None:
    assert p_value(counts(accepted(temperature)), twenty() ** (1 / temperature)) > 0.001


@pytest.mark.parametrize(("temperature", "first_stage_alone"), [(0.4, 1 / 2), (0.7, 1.0)])
def test_accepting_after_the_first_stage_alone_would_be_caught(temperature: float, first_stage_alone: float) -> None:
    """The planted fault: with n = floor(1/T) draws equal, a chunk is one of P^n, not of P^(1/T)."""
    assert p_value(counts(accepted(first_stage_alone)), twenty() ** (1 / temperature)) < 1e-6


@pytest.mark.parametrize("temperature", [0.4, 0.5, 0.7, 1.0])
def test_rejection_uses_as_many_draws_as_the_formula_says(temperature: float) -> None:
    used = accepted(temperature).used.double()
    error = float(used.std()) / len(used) ** 0.5
    assert abs(float(used.mean()) - expected_draws(twenty(), temperature)) <= 4 * error


def test_a_context_answers_alike_alone_and_in_a_batch_and_however_many_draws_are_asked_for_at_once() -> None:
    together = accepted(0.4, rows=12)
    assert torch.equal(together.chunks, accepted(0.4, rows=12, at_once=1).chunks)
    assert torch.equal(together.used, accepted(0.4, rows=12, at_once=50).used)
    one_at_a_time = accepted(0.4, rows=12, at_once=1)
    assert torch.equal(one_at_a_time.made, one_at_a_time.used)
    for row in (0, 7, 11):
        alone = seeds(1, row)
        draw = KnownDraws(twenty(), alone)
        single = exact(draw, temperature=0.4, seeds=alone, positions=zeros(1))
        assert torch.equal(single.chunks[0], together.chunks[row])


def test_settled_rows_are_not_drawn_for_again() -> None:
    draw = KnownDraws(twenty(), seeds(40))
    found = exact(draw, temperature=0.5, seeds=seeds(40), positions=zeros(40))
    assert draw.made == int(found.made.sum())


def test_a_flat_distribution_ends_at_the_bound_and_the_error_names_temperature_and_draws() -> None:
    flat = torch.full((10**6,), 1e-6).double()
    draw = KnownDraws(flat, seeds(2))
    found = exact(draw, temperature=0.5, seeds=seeds(2), positions=zeros(2), limit=100)
    assert not found.settled.any()
    assert torch.equal(found.chunks, torch.full((2, 2), -1))
    with pytest.raises(FailedError, match=r"temperature = 0\.5: none of 100 draws of context 0"):
        found.checked(0.5)


@pytest.mark.parametrize("temperature", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_rejection_refuses_other_temperatures_by_their_value(temperature: float) -> None:
    with pytest.raises(RefusedError, match=f"temperature = {temperature}"):
        accepted(temperature)


def test_a_temperature_of_one_over_n_needs_no_second_stage_whatever_its_rounding() -> None:
    for n in range(1, 200):
        p = torch.tensor([1.0])
        assert expected_draws(p, 1 / n) == n


def test_a_vote_of_five_hundred_is_close_to_the_square() -> None:
    rows = 2000
    draw = KnownDraws(twenty(), seeds(rows))
    found = vote(draw, temperature=0.5, draws=500, seeds=seeds(rows), positions=zeros(rows))
    wanted = twenty() ** 2 / (twenty() ** 2).sum()
    distance = 0.5 * float((counts(found) / rows - wanted).abs().sum())
    assert distance < 0.05
    plain = 0.5 * float((twenty() - wanted).abs().sum())
    assert plain > 0.3  # what a sampler without temperature would show


def test_a_vote_at_temperature_one_is_a_draw() -> None:
    found = vote(KnownDraws(twenty(), seeds()), temperature=1.0, draws=3, seeds=seeds(), positions=zeros())
    assert p_value(counts(found), twenty()) > 0.001


def test_greedy_is_the_most_frequent_chunk_and_the_limit_of_votes() -> None:
    rows = 50
    draw = KnownDraws(twenty(), seeds(rows))
    settings = {"draws": 200, "seeds": seeds(rows), "positions": zeros(rows)}
    greedy = vote(draw, temperature=0.0, **settings)
    drawn = draw(torch.arange(rows), 0, 200)[..., 0]
    for row in range(rows):
        times = torch.bincount(drawn[row], minlength=20)
        assert times[greedy.chunks[row, 0]] == times.max()
    assert torch.equal(greedy.chunks, vote(draw, temperature=1 / 200, **settings).chunks)


def test_a_vote_does_not_depend_on_the_batch_nor_on_how_many_are_drawn_at_once() -> None:
    draw = KnownDraws(twenty(), seeds(9))
    settings = {"temperature": 0.5, "draws": 30, "seeds": seeds(9), "positions": zeros(9)}
    whole = vote(draw, **settings)
    assert torch.equal(whole.chunks, vote(draw, **settings, at_once=7).chunks)
    alone = seeds(1, 4)
    single = vote(KnownDraws(twenty(), alone), temperature=0.5, draws=30, seeds=alone, positions=zeros(1))
    assert torch.equal(single.chunks[0], whole.chunks[4])


def test_a_vote_refuses_a_temperature_between_and_names_those_beside_it() -> None:
    with pytest.raises(RefusedError, match=r"temperature = 0\.4") as refused:
        vote(KnownDraws(twenty(), seeds(1)), temperature=0.4, draws=10, seeds=seeds(1), positions=zeros(1))
    assert "0.3333333333333333 or 0.5" in str(refused.value.next)
    with pytest.raises(RefusedError, match="draws = 2"):
        vote(KnownDraws(twenty(), seeds(1)), temperature=1 / 3, draws=2, seeds=seeds(1), positions=zeros(1))


def test_another_seed_or_position_is_another_choice() -> None:
    rows = 200
    tie = torch.tensor([0.5, 0.5]).double()
    draw = KnownDraws(tie, torch.zeros(rows, dtype=torch.int64))  # the same draws in each row: the choice alone differs
    found = vote(draw, temperature=0.5, draws=20, seeds=zeros(rows), positions=seeds(rows))
    assert set(found.chunks[:, 0].tolist()) == {0, 1}
    found = vote(draw, temperature=0.5, draws=20, seeds=seeds(rows), positions=zeros(rows))
    assert set(found.chunks[:, 0].tolist()) == {0, 1}
