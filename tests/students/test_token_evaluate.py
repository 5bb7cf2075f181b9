"""A token-level model against text: BrierLM where it is known, the contexts of a latent student, likelihood."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.students.causal import ModelShape, Student, new_model
from latentforge.students.latent.brier import BrierLM, brier_lm, sample_scores, token_scores
from latentforge.students.latent.evaluate import continuations
from latentforge.students.likelihood import chunk_logprobs, row_logprobs
from latentforge.students.token_evaluate import TokenContinuations, token_continuations

from .known_model import markov_model
from .latent.conftest import EOS, MarkovSource, untrained_model


def source() -> MarkovSource:
    return MarkovSource.peaked(vocabulary=6, sharpness=1.3, seed=3)


def rows_of(model: MarkovSource, count: int, length: int) -> Tensor:
    seeds = torch.arange(count)
    first = model.first(seeds)
    return torch.cat([first[:, None], model.draw(first, seeds, length - 1)], dim=1)


def score(found: TokenContinuations) -> BrierLM:
    return brier_lm(token_scores(found.truth_logprobs, found.samples, found.collisions), groups=found.rows)


def small(seed: int = 1, vocabulary: int = 40) -> Student:
    model = new_model(ModelShape(2, 32, 4, 2, 48), vocab_size=vocabulary, positions=64, eos_id=EOS, seed=seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return Student(model, vocabulary).eval()


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_perfect_token_level_model_has_the_sources_own_brierlm(chunk: int) -> None:
    model = source()
    student = Student(markov_model(model.rows, eos_id=5), 6)
    # The source says its last token as any other: no text ends.
    found = token_continuations(
        student, rows_of(model, 60, 32).unflatten(1, (-1, chunk)), eos_id=-1, draws=4, seed=10**6
    )
    value = score(found)
    wanted = model.optimum().tolist()
    assert abs(value.value - 100 * float(model.optimum().prod()) ** 0.25) <= 3 * value.error
    for got, want, error in zip(value.orders, wanted, value.order_errors, strict=True):
        assert abs(got - want) <= 3 * error
    plain = brier_lm(sample_scores(found.samples, found.truth), groups=found.rows)
    assert value.error < plain.error


def test_another_model_scores_less() -> None:
    model, other = source(), MarkovSource.peaked(vocabulary=6, sharpness=1.3, seed=9)
    text = rows_of(model, 40, 32).unflatten(1, (-1, 4))
    right, wrong = (
        score(token_continuations(Student(markov_model(one.rows), 6), text, eos_id=-1, draws=4))
        for one in (model, other)
    )
    assert wrong.high < right.low


def test_contexts_and_text_are_those_of_a_latent_student() -> None:
    text = torch.randint(1, 40, (3, 6, 4), generator=torch.Generator().manual_seed(8))
    text[1, 2, 1:] = EOS
    ours = token_continuations(small(), text, eos_id=EOS, draws=2)
    theirs = continuations(untrained_model(4), text, draws=2)
    for name in ("rows", "places", "truth"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_what_is_said_is_the_models_own_on_its_own_tokens_and_nothing_follows_an_end() -> None:
    student = small(vocabulary=12)  # few tokens, so that some draws end
    text = torch.randint(1, 12, (3, 5, 2), generator=torch.Generator().manual_seed(8))
    text[1, 3, 0] = text[1, 3, 1] = EOS
    found = token_continuations(student, text, eos_id=EOS, draws=8, seed=5)
    ended = 0
    for context in range(len(found.samples)):
        row, place = int(found.rows[context]), int(found.places[context])
        before = text[row, : place + 1].flatten()
        for number in range(8):
            sample = found.samples[context, number]
            whole = student.logits(torch.cat([before, sample, sample[:1]])[None]).softmax(-1)
            wanted = whole[len(before) - 1 : len(before) + 3].square().sum(-1)
            over = int((sample == EOS).long().argmax()) + 1 if bool((sample == EOS).any()) else 4
            ended += over < 4
            assert torch.allclose(found.collisions[context, number, :over], wanted[:over], atol=1e-5)
            assert bool((found.collisions[context, number, over:] == 1).all())
            assert bool((sample[over:] == EOS).all())
        truth = found.truth[context]
        said = student.logits(torch.cat([before, truth, truth[:1]])[None]).log_softmax(-1)[len(before) - 1 :]
        over = int((truth == EOS).long().argmax()) + 1 if bool((truth == EOS).any()) else 4
        assert torch.allclose(found.truth_logprobs[context, :over], said[range(4), truth][:over], atol=1e-4)
        assert bool((found.truth_logprobs[context, over:] == 0).all())
    assert ended


def test_blocks_of_rows_change_nothing() -> None:
    text = torch.randint(1, 40, (5, 4, 4), generator=torch.Generator().manual_seed(8))
    whole = token_continuations(small(), text, eos_id=EOS, draws=3)
    blocks = token_continuations(small(), text, eos_id=EOS, draws=3, most_rows=6)
    for name in ("samples", "truth", "rows", "places"):
        assert torch.equal(getattr(whole, name), getattr(blocks, name))
    assert torch.allclose(whole.collisions, blocks.collisions, atol=1e-6)


def test_likelihood_is_that_of_the_whole_row_and_by_windows_that_of_what_a_window_shows() -> None:
    student, text = small(), torch.randint(1, 40, (2, 30), generator=torch.Generator().manual_seed(8))
    wanted = student.logits(text).log_softmax(-1).gather(1, text[:, 1:].reshape(-1, 1)).reshape(2, 29)
    assert torch.allclose(row_logprobs(student, text), wanted, atol=1e-5)
    found = row_logprobs(student, text, window=8)
    assert torch.allclose(found[:, :8], wanted[:, :8], atol=1e-5)
    assert found.shape == wanted.shape
    last = student.logits(text[:, 20:29])  # a window of inputs 20 to 27 gives tokens 25 to 28
    said = last.log_softmax(-1).gather(1, text[:, 21:29].reshape(-1, 1)).reshape(2, 8)
    assert torch.allclose(found[:, 24:28], said[:, 4:], atol=1e-5)


def test_a_source_has_its_own_entropy_by_windows_too() -> None:
    model = source()
    text = rows_of(model, 8, 64)
    found = row_logprobs(Student(markov_model(model.rows), 6), text, window=16)
    assert torch.allclose(found.double().exp(), model.rows[text[:, :-1], text[:, 1:]], atol=1e-5)


def test_the_token_head_says_the_chain_of_conditionals() -> None:
    model = untrained_model(4)
    text = torch.randint(1, 40, (2, 4, 4), generator=torch.Generator().manual_seed(8))
    found = chunk_logprobs(model.student, text, EOS)
    assert found.shape == (2, 3, 4)
    states = model.student.states(text[:, :-1], text[:, :-1] >= 0)
    hidden = model.student.token_rows(states[0, 1:2], text[0, 2:3])[0]
    wanted = (hidden @ model.student.table.weight.T).log_softmax(-1)[range(4), text[0, 2]]
    assert torch.allclose(found[0, 1], wanted, atol=1e-5)
    with pytest.raises(RefusedError, match="no token head"):
        chunk_logprobs(untrained_model(4, token_layers=0).student, text, EOS)


def test_rows_without_a_prediction_are_refused() -> None:
    with pytest.raises(RefusedError, match="rows of 1 tokens"):
        row_logprobs(small(), torch.ones(2, 1, dtype=torch.int64))
    with pytest.raises(RefusedError, match="window = 1"):
        row_logprobs(small(), torch.ones(2, 9, dtype=torch.int64), window=1)
    with pytest.raises(RefusedError, match="rows of 1 chunks of 4"):
        token_continuations(small(), torch.ones(2, 1, 4, dtype=torch.int64), eos_id=EOS, draws=2)
