"""BrierLM: right where the answer is known, with an interval that covers it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.students.latent.brier import BrierLM, brier_lm, roll_out, sample_scores, token_scores

from .conftest import MarkovSource, uniforms

CONTEXTS, DRAWS = 1500, 12


def source() -> MarkovSource:
    """A small source: its orders are large enough to be measured well."""
    return MarkovSource.peaked(vocabulary=4, sharpness=1.3, seed=3)


def texts(model: MarkovSource, contexts: int = CONTEXTS, length: int = 4) -> tuple[Tensor, Tensor]:
    """(the token before, int64 [B]; the text after it, int64 [B, length])."""
    seeds = torch.arange(contexts)
    before = model.first(seeds)
    return before, model.draw(before, seeds, length)


def drawn(model: MarkovSource, before: Tensor, draws: int = DRAWS) -> Tensor:
    seeds = 10**6 + torch.arange(len(before) * draws)
    return model.draw(before.repeat_interleave(draws), seeds, 4).reshape(len(before), draws, 4)


def agrees(found: BrierLM, orders: list[float]) -> bool:
    """Each order, and the whole, within 3 standard errors of what it must be."""
    value = 100 * float(torch.tensor(orders).double().prod()) ** 0.25
    each = zip(found.orders, found.order_errors, orders, strict=True)
    return abs(found.value - value) <= 3 * found.error and all(abs(got - want) <= 3 * e for got, e, want in each)


def test_the_known_source_is_what_exact_enumeration_says() -> None:
    model = MarkovSource.peaked(vocabulary=3)
    chunks = torch.tensor(list(itertools.product(range(3), repeat=4)))
    wanted = torch.zeros(4).double()
    for before, share in enumerate(model.stationary()):
        p = model.probability(torch.full((81,), before), chunks)
        assert float(p[:, 3].sum()) == pytest.approx(1)
        # A prefix of n tokens stands 3^(4 - n) times among the 81 chunks.
        wanted += share * torch.stack([(p[:, n] ** 2).sum() / 3 ** (3 - n) for n in range(4)])
    assert torch.allclose(model.optimum(), wanted)
    assert (model.independent() <= wanted + 1e-12).all()
    assert torch.allclose(model.stationary() @ model.rows, model.stationary())


def test_the_default_source_has_an_optimum_of_5_24() -> None:
    model = MarkovSource.peaked()
    assert model.rows.shape == (32, 32)
    assert float(100 * model.optimum().prod() ** 0.25) == pytest.approx(5.24, abs=0.01)


def test_a_perfect_model_reaches_the_optimum_within_its_errors() -> None:
    model = source()
    before, truth = texts(model)
    found = brier_lm(sample_scores(drawn(model, before), truth))
    assert agrees(found, model.optimum().tolist())
    assert found.low < found.value < found.high
    assert found.contexts == CONTEXTS


def test_a_uniform_model_has_the_analytic_value_within_its_errors() -> None:
    model = source()
    _, truth = texts(model)
    samples = torch.randint(0, 4, (CONTEXTS, 30, 4), generator=torch.Generator().manual_seed(3))
    assert agrees(brier_lm(sample_scores(samples, truth)), [4.0**-n for n in range(1, 5)])


def test_independent_draws_by_position_lose_to_the_joint_distribution() -> None:
    """The planted fault of a student that draws each position from its own distribution."""
    model = source()
    before, truth = texts(model)
    sums = model.marginals()[before].cumsum(-1)
    chances = uniforms(10**6 + torch.arange(CONTEXTS)[:, None, None], torch.arange(4), torch.arange(DRAWS)[:, None])
    samples = torch.searchsorted(sums, chances.transpose(1, 2).contiguous()).clamp_max(3).transpose(1, 2)
    independent = brier_lm(sample_scores(samples, truth))
    best = brier_lm(sample_scores(drawn(model, before), truth))
    assert agrees(independent, model.independent().tolist())
    assert not agrees(independent, model.optimum().tolist())
    assert independent.high < best.low


def test_the_score_of_positions_drawn_by_themselves_is_no_bound_on_a_student_that_draws_them_sharper() -> None:
    """Each order is proper, so the source has the most; of products of positions theirs is not the best."""
    model = MarkovSource.peaked()
    plain, sharper, best = (
        100 * float(orders.prod()) ** 0.25
        for orders in (model.independent(), model.independent(power=1.2), model.optimum())
    )
    assert plain == pytest.approx(3.52, abs=0.01)
    assert sharper == pytest.approx(4.55, abs=0.01)
    assert sharper < best


def test_two_orders_below_zero_make_no_good_mark() -> None:
    """The planted fault of a bound on the product alone: here it is positive, with two orders below 0."""
    scores = torch.tensor([[0.5, -0.2, -0.1, 0.3], [0.4, -0.3, -0.2, 0.2]])
    found = brier_lm(scores)
    assert torch.tensor(found.orders).prod() > 0
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    assert found.orders[1] < 0  # said as it is


def test_a_constant_model_scores_below_zero() -> None:
    model = source()
    _, truth = texts(model)
    found = brier_lm(sample_scores(torch.full((CONTEXTS, 2, 4), 1), truth))
    assert all(order < 0 for order in found.orders)
    assert found.value == 0


def test_more_draws_make_it_more_certain() -> None:
    model = source()
    before, truth = texts(model, 600)
    samples = drawn(model, before)
    assert brier_lm(sample_scores(samples, truth)).error < brier_lm(sample_scores(samples[:, :2], truth)).error


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    model = source()
    value, covered = 100 * float(model.optimum().prod()) ** 0.25, 0
    before, truth = texts(model, 60 * 100)
    scores = sample_scores(drawn(model, before, 4), truth).reshape(60, 100, 4)
    for part in scores:
        found = brier_lm(part, resamples=200)
        covered += found.low <= value <= found.high
    assert covered >= 48  # 57 are expected


def test_contexts_of_one_document_are_no_independent_evidence() -> None:
    model = source()
    before, truth = texts(model, 200)
    scores = sample_scores(drawn(model, before), truth)
    copied = scores.repeat_interleave(9, dim=0)
    documents = torch.arange(200).repeat_interleave(9)
    assert brier_lm(copied).error < 0.5 * brier_lm(scores).error
    assert brier_lm(copied, groups=documents).error == pytest.approx(brier_lm(scores).error)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 8])
def test_chunks_of_any_length_are_rolled_out_to_the_same_value(chunk: int) -> None:
    model = source()
    before, truth = texts(model, 1000)
    asked = []

    def draw(contexts: Tensor, after: Tensor, numbers: Tensor) -> Tensor:
        asked.append(len(contexts))
        last = after[:, -1] if after.shape[1] else before[contexts]
        assert bool((last >= 0).all())
        return model.draw(last, 10**9 * (after.shape[1] + 1) + contexts * 100 + numbers, chunk)

    samples = roll_out(draw, truth, chunk=chunk, draws=DRAWS)
    assert samples.shape == (1000, DRAWS, 4)
    assert agrees(brier_lm(sample_scores(samples, truth)), model.optimum().tolist())
    assert len(asked) == -(-4 // chunk)
    assert asked == sorted(asked, reverse=True)  # what can no longer agree is not drawn
    assert len(asked) == 1 or asked[-1] < asked[0]


def test_a_text_that_ended_is_one_outcome_and_is_not_continued() -> None:
    truth = torch.tensor([[3, 0, 0, 0], [0, 0, 0, 0]])

    def draw(contexts: Tensor, after: Tensor, numbers: Tensor) -> Tensor:
        assert not bool((after == 0).any())
        # Context 0 says 3, then EOS; context 1 EOS at once, with leftovers behind it.
        first = torch.stack([torch.where(contexts == 0, 3, 0), torch.where(contexts == 0, 0, 1 + numbers)], dim=-1)
        return first if not after.shape[1] else torch.full((len(contexts), 2), 5)

    samples = roll_out(draw, truth, chunk=2, draws=3, eos_id=0)
    assert torch.equal(samples, truth[:, None].expand(2, 3, 4))
    assert torch.equal(sample_scores(samples, truth), torch.ones(2, 4).double())


def test_token_probabilities_give_the_same_value_with_less_noise() -> None:
    model = source()
    before, truth = texts(model)
    samples = drawn(model, before)
    path = torch.cat([before[:, None], truth], dim=1)
    logprobs = model.rows[path[:, :-1], path[:, 1:]].log()
    previous = torch.cat([before[:, None, None].expand(-1, DRAWS, 1), samples[..., :3]], dim=2)
    found = brier_lm(token_scores(logprobs, samples, (model.rows**2).sum(-1)[previous]))
    assert agrees(found, model.optimum().tolist())
    assert found.error < brier_lm(sample_scores(samples[:, :2], truth)).error


def test_what_cannot_be_scored_is_refused_by_its_shape() -> None:
    truth = torch.zeros(5, 4, dtype=torch.int64)
    with pytest.raises(RefusedError, match=r"samples are \[5, 1, 4\]"):
        sample_scores(torch.zeros(5, 1, 4, dtype=torch.int64), truth)
    with pytest.raises(RefusedError, match=r"samples are \[5, 2, 3\]"):
        sample_scores(torch.zeros(5, 2, 3, dtype=torch.int64), truth)
    with pytest.raises(RefusedError, match=r"the text is \[4, 4\]"):
        sample_scores(torch.zeros(5, 2, 4, dtype=torch.int64), truth[:4])
    with pytest.raises(RefusedError, match=r"scores \[0, 4\]"):
        brier_lm(torch.zeros(0, 4))
    with pytest.raises(RefusedError, match="collisions"):
        token_scores(truth.double(), torch.zeros(5, 2, 4, dtype=torch.int64), torch.zeros(5, 3, 4))
