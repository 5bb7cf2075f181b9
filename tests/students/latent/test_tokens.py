"""Token after token by the token head: top-k, top-p, greedy, scores, the best of several, and a beam."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from latentforge.errors import RefusedError
from latentforge.students.causal import ModelShape, new_model
from latentforge.students.latent.beam import GREEDY, beam_search
from latentforge.students.latent.generate import Keys, Request, Sampling, generate
from latentforge.students.latent.scoring import Scorer, best_of, scored, seed_of
from latentforge.students.token_session import TokenModel

from .conftest import EOS, VOCABULARY, p_value, untrained_model


def token_level(layers: int = 2, width: int = 32, *, cache: bool = True) -> TokenModel:
    shape = ModelShape(layers, width, heads=width // 8, kv_heads=width // 16, intermediate=48)
    model = new_model(shape, vocab_size=VOCABULARY, positions=64, eos_id=EOS, seed=3)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.dim() > 1:
                weight.mul_(10)
        model.lm_head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(5))
        model.lm_head.weight[EOS] *= 0.3
    return TokenModel(model, VOCABULARY, EOS, cache=cache)


MODELS = {
    "K = 4": lambda: untrained_model(4),
    "K = 1": lambda: untrained_model(1),
    "token level": token_level,
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Scorer:
    found: Scorer = MODELS[request.param]()
    return found


def prompt(length: int, start: int = 1) -> tuple[int, ...]:
    return tuple(1 + (start * 7 + 3 * place) % (VOCABULARY - 1) for place in range(length))


def next_logprobs(model: Scorer, text: tuple[int, ...]) -> torch.Tensor:
    """Of each token after ``text``, [V]: from the scores of the texts that are one token longer."""
    longer = [torch.tensor((*text, token)) for token in range(VOCABULARY)]
    return torch.stack([one[-1] for one in model.score(longer)])


def test_probabilities_are_those_of_the_whole_vocabulary_after_any_text(model: Scorer) -> None:
    for length in (0, 1, 3, 4, 7):
        assert next_logprobs(model, prompt(length)).exp().sum() == pytest.approx(1, abs=1e-5)


def test_greedy_takes_the_likeliest_token_after_each_true_prefix(model: Scorer) -> None:
    (found,) = generate(model, [Request(prompt(5), 7, sampling=GREEDY)])
    text = prompt(5)
    for token in found.tokens:
        assert token == next_logprobs(model, text).argmax()
        text = (*text, token)
    assert found.draws == 0


@pytest.mark.parametrize(("top_k", "top_p"), [(3, None), (None, 0.5), (8, 0.7)])
def test_a_token_is_drawn_from_those_that_top_k_and_then_top_p_leave(
    model: Scorer, top_k: int | None, top_p: float | None
) -> None:
    text, temperature, count = prompt(6), 0.7, 3000
    wanted = (next_logprobs(model, text) / temperature).softmax(-1)
    order = wanted.argsort(descending=True)
    left = order[:top_k]
    if top_p is not None:
        share = wanted[left] / wanted[left].sum()
        left = left[: int((share.cumsum(0) < top_p).sum()) + 1]
    kept = torch.zeros(VOCABULARY).index_fill(0, left, 1.0) * wanted
    sampling = Sampling("tokens", temperature, top_k=top_k, top_p=top_p)
    found = generate(model, [Request(text, 1, seed, sampling) for seed in range(count)])
    counts = torch.bincount(torch.tensor([one.tokens[0] for one in found]), minlength=VOCABULARY)
    assert int(counts[kept == 0].sum()) == 0
    assert 1 < len(left) < VOCABULARY
    assert p_value(counts, kept / kept.sum()) > 1e-4
    # Without them the rest is drawn too: the cut is what left it out.
    plain = generate(model, [Request(text, 1, seed, Sampling("tokens", temperature)) for seed in range(count)])
    assert len({one.tokens[0] for one in plain}) > len(left)


def test_one_token_left_is_greedy_and_all_of_them_are_no_cut(model: Scorer) -> None:
    def tokens(*settings: Any) -> list[Any]:
        return generate(model, [Request(prompt(n), 9, n, Sampling("tokens", *settings)) for n in (0, 3, 8)])

    greedy = tokens(0.0)
    assert tokens(1.0, 200, 1) == tokens(1.3, 200, None, 1e-6) == greedy
    assert tokens(0.9, 200, VOCABULARY, 1.0) == tokens(0.9) != greedy


def test_a_batch_of_every_method_is_each_by_itself(model: Scorer) -> None:
    requests = [
        Request(prompt(5), 11, 3, Sampling("tokens", 0.8, top_k=5)),
        Request(prompt(8), 7, 3, Sampling("tokens", 0.8, top_p=0.9)),
        Request(prompt(2), 9, 4, Sampling("head")),
        Request((), 9, 2**63 - 1, GREEDY),
        Request(prompt(3), 13, -5, Sampling("vote", 0.5, 20)),
        Request(prompt(9), 6, 5, Sampling("tokens", 1.2, top_k=5)),
    ]
    together = generate(model, requests)
    assert together == [generate(model, [one])[0] for one in requests]
    assert generate(model, requests[::-1]) == together[::-1]


def test_of_a_token_level_student_one_draw_of_the_head_is_a_token_by_its_probabilities() -> None:
    one = token_level()
    both = ([Request(prompt(n), 12, n, Sampling(name, 0.6)) for n in range(4)] for name in ("head", "tokens"))
    first, second = (generate(one, requests) for requests in both)
    assert [a.tokens for a in first] == [b.tokens for b in second]


def test_a_score_is_the_sum_of_the_conditionals_that_a_session_gives(model: Scorer) -> None:
    text = prompt(7, 2)
    whole = torch.tensor(text).reshape(-1, 1) if model.chunk == 1 else None
    size = model.chunk
    wanted = []
    for place, token in enumerate(text):
        chunks, within = divmod(place, size)
        before = torch.tensor(text[: chunks * size]).reshape(chunks, size) if whole is None else whole[:place]
        begun = torch.full((1, size), EOS)
        begun[0, :within] = torch.tensor(text[chunks * size : place])
        wanted.append(model.begin([before.long()]).logprobs(torch.tensor([0]), begun, within)[0, token])
    (found,) = model.score([torch.tensor(text)])
    assert torch.allclose(found, torch.stack(wanted), atol=1e-4)
    assert len(found.unique()) > 5


def test_texts_scored_together_are_each_by_itself(model: Scorer) -> None:
    texts = [torch.tensor(prompt(n, n), dtype=torch.int64) for n in (7, 0, 4, 1, 12)]
    texts.append(torch.tensor([*prompt(4), EOS]))
    together = model.score(texts)
    assert [len(one) for one in together] == [7, 0, 4, 1, 12, 5]
    for text, found in zip(texts, together, strict=True):
        assert torch.allclose(found, model.score([text])[0], atol=1e-5)
    assert model.score([]) == []


def test_the_best_of_eight_is_at_least_the_single_text_of_the_same_request(model: Scorer) -> None:
    requests = [Request(prompt(n), 8, n, Sampling("tokens", 1.0)) for n in range(4)]
    best = best_of(model, requests, 8)
    single = scored(model, generate(model, requests))
    for one, alone, request in zip(best, single, requests, strict=True):
        assert one.scores[0] == pytest.approx(alone.score, abs=1e-5)
        assert one.chosen.score == max(one.scores)
        assert len(set(one.scores)) > 4
        number = one.scores.index(one.chosen.score)
        (again,) = generate(model, [replace(request, seed=seed_of(request.seed, number))])
        assert again == one.chosen.generated
    assert best_of(model, requests[2:3], 8)[0].chosen.generated == best[2].chosen.generated
    mean = [sum(each) / 4 for each in ([one.chosen.score for one in best], [one.score for one in single])]
    assert mean[0] > mean[1]


def test_a_beam_as_wide_as_the_vocabulary_finds_the_best_of_all_texts(model: Scorer) -> None:
    text = prompt(3)  # two tokens of K = 4: one in the begun chunk, one in the next
    every = [(EOS,), *((a, b) for a, b in product(range(1, VOCABULARY), range(VOCABULARY)))]
    scores = [float(row[3:].mean()) for row in model.score([torch.tensor((*text, *more)) for more in every])]
    found = beam_search(model, Request(text, 2, sampling=GREEDY), VOCABULARY)
    assert found.generated.tokens == every[max(range(len(every)), key=scores.__getitem__)]
    assert found.score == pytest.approx(max(scores), abs=1e-4)


@pytest.mark.parametrize("length", [0, 1, 4, 6])
def test_a_beam_of_one_is_greedy_and_its_score_that_of_its_text(model: Scorer, length: int) -> None:
    request = Request(prompt(length), 9, sampling=GREEDY)
    greedy = scored(model, generate(model, [request]))[0]
    narrow = beam_search(model, request, 1)
    assert narrow.generated == greedy.generated
    for width in (1, 4):
        found = beam_search(model, request, width)
        assert found.logprobs == pytest.approx(scored(model, [found.generated])[0].logprobs, abs=1e-4)


def test_a_beam_ends_a_text_where_the_end_is_likeliest() -> None:
    one = token_level()
    with torch.no_grad():  # every state ends the text
        head = one.student.model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY).index_fill_(0, torch.tensor([EOS]), 30.0))
    found = beam_search(one, Request(prompt(3), 9, sampling=GREEDY), 3)
    assert (found.generated.tokens, found.generated.finish) == ((EOS,), "eos")


def test_without_a_token_head_what_needs_probabilities_is_refused_by_name() -> None:
    one = untrained_model(token_layers=0)
    with pytest.raises(RefusedError, match="request 0: method = 'tokens': this student has no token head"):
        generate(one, [Request(prompt(4), 4, sampling=Sampling("tokens", 0.8, top_k=3))])
    with pytest.raises(RefusedError, match="no token head"):
        beam_search(one, Request(prompt(4), 4, sampling=GREEDY), 2)
    with pytest.raises(RefusedError, match="no token head"):
        best_of(one, [Request(prompt(4), 4)], 2)
    with pytest.raises(RefusedError, match="no token head"):
        one.score([torch.tensor([1])])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("head", 1.0, 200, 5), "top_k = 5: the method 'head' draws whole chunks"),
        (("exact", 0.5, 200, None, 0.9), r"top_p = 0\.9: the method 'exact'"),
        (("tokens", 1.0, 200, 0), "top_k"),
        (("tokens", 1.0, 200, None, 0.0), "top_p"),
        (("tokens", 1.0, 200, None, 1.5), "top_p"),
        (("tokens", -1.0), "temperature"),
        (("tokens", float("nan")), "temperature"),
    ],
)
def test_a_cut_that_there_is_not_is_refused_by_its_value(settings: tuple[Any, ...], words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        Sampling(*settings)


def test_what_cannot_be_scored_searched_or_compared_is_refused_by_its_value() -> None:
    one = token_level()
    with pytest.raises(RefusedError, match=f"request 0: top_k = {VOCABULARY + 1} is more than the {VOCABULARY}"):
        generate(one, [Request((1,), 1, sampling=Sampling("tokens", top_k=VOCABULARY + 1))])
    with pytest.raises(RefusedError, match="text 1: token 77 at place 1"):
        one.score([torch.tensor([1]), torch.tensor([1, 77])])
    with pytest.raises(RefusedError, match="text 0: tokens follow the end"):
        one.score([torch.tensor([EOS, 1])])
    with pytest.raises(RefusedError, match="beam = 0"):
        beam_search(one, Request((1,), 1, sampling=GREEDY), 0)
    with pytest.raises(RefusedError, match="a beam draws nothing"):
        beam_search(one, Request((1,), 1), 2)
    with pytest.raises(RefusedError, match="best of 0"):
        best_of(one, [Request((1,), 1)], 0)
    with pytest.raises(RefusedError, match="best of 2 at temperature 0"):
        best_of(one, [Request((1,), 1, sampling=GREEDY)], 2)


def test_what_a_key_draws_in_a_chunk_is_drawn_anew_at_each_place() -> None:
    """The same seed at each place of a chunk: noise that did not depend on the place would repeat a token."""
    session = untrained_model(4).begin([torch.empty(0, 4, dtype=torch.int64)] * 64)
    keys = Keys(torch.arange(64), torch.zeros(64, dtype=torch.int64))
    nothing, none = torch.full((64, 4), EOS), torch.zeros(64, dtype=torch.int64)
    found = session.complete(torch.arange(64), keys, nothing, none, torch.full((64,), 3.0))
    assert max(int((found[:, a] == found[:, b]).sum()) for a, b in ((0, 1), (1, 2), (2, 3))) < 20
