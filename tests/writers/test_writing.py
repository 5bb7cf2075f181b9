"""Texts for prompts: whole, in their pieces and in any batch the same, whatever the prompt is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentforge.errors import RefusedError
from latentforge.students.latent.requests import Sampling
from latentforge.writers.opening import Writer, open_writer
from latentforge.writers.writing import Said, Wish, Written, sampling_of, write

from ..latent_folders import Folders
from ..students.latent.conftest import untrained_model

PROMPTS = ("def main(", "", "class A:\n    ", "é€😀", "x" * 30, "<|endoftext|>")


@pytest.fixture(scope="module", params=["latent", "token"])
def writer(request: pytest.FixtureRequest, folders: Folders) -> Writer:
    return open_writer(folders.latent if request.param == "latent" else folders.token)


def wish(tokens: int = 9, *settings: object, **words: int) -> Wish:
    return Wish(tokens, Sampling(*(settings or ("head", 1.0))), **words)  # type: ignore[arg-type]


def whole(writer: Writer, prompts: tuple[str, ...], wish: Wish) -> list[Written]:
    found = [one for one in write(writer, prompts, wish) if isinstance(one, Written)]
    return [one._replace(seconds=0.0) for one in sorted(found, key=lambda one: one.number)]


@settings(max_examples=25)
@given(prompt=st.text(max_size=12), tokens=st.integers(1, 14), seed=st.integers(-(2**63), 2**63 - 1))
def test_any_prompt_is_kept_and_the_pieces_are_the_text(writer: Writer, prompt: str, tokens: int, seed: int) -> None:
    decode = writer.tokenizer.backend.decode
    said = list(write(writer, (prompt,), wish(tokens, seed=seed)))
    done = said.pop()
    assert isinstance(done, Written)
    assert done.prompt == prompt == decode(list(done.prompt_tokens), skip_special_tokens=False)
    assert all(isinstance(one, Said) and one.number == 0 for one in said)
    assert "".join(one.text for one in said) == done.text
    assert tuple(token for one in said for token in one.tokens) == done.tokens
    assert decode([*done.prompt_tokens, *done.tokens]) == prompt + done.text
    assert (done.finish == "eos") == (done.tokens[-1] == writer.tokenizer.eos_id)
    assert len(done.tokens) == tokens or done.finish == "eos"
    assert len(done.tokens) <= tokens


@pytest.mark.parametrize("how", [("head", 1.0), ("vote", 0.5, 10), ("tokens", 0.8, 200, 7, 0.9)])
def test_a_prompt_is_answered_alike_in_any_batch(writer: Writer, how: tuple[object, ...]) -> None:
    together = whole(writer, PROMPTS, wish(9, *how, batch=4))
    assert [one.prompt for one in together] == list(PROMPTS)
    assert together == whole(writer, PROMPTS, wish(9, *how, batch=1))
    alone = whole(writer, PROMPTS[2:3], wish(9, *how, seed=2))[0]
    assert alone._replace(number=2) == together[2]
    assert whole(writer, PROMPTS[2:3], wish(9, *how, seed=3))[0].tokens != together[2].tokens


def test_scores_are_of_the_tokens_that_were_written(writer: Writer) -> None:
    found = whole(writer, PROMPTS, replace(wish(6), scores=True))
    for one in found:
        assert one.logprobs is not None
        assert one.score is not None
        assert len(one.logprobs) == len(one.tokens)
        assert one.score == pytest.approx(sum(one.logprobs) / len(one.tokens))
    assert whole(writer, PROMPTS, wish(6)) == [one._replace(logprobs=None) for one in found]


def test_the_best_of_several_and_a_beam_say_nothing_before_they_know_their_text(writer: Writer) -> None:
    single = whole(writer, PROMPTS, replace(wish(6, "tokens", 1.0), scores=True))
    for one, alone in zip(write(writer, PROMPTS, wish(6, "tokens", 1.0, best_of=8)), single, strict=True):
        assert isinstance(one, Written)
        assert one.scores is not None
        assert len(one.scores) == 8
        assert one.score == max(one.scores) >= (alone.score or 0.0) - 1e-4
    greedy = replace(wish(6, "tokens", 0.0), scores=True)
    beams = list(write(writer, PROMPTS, wish(6, beam=4)))
    assert all(isinstance(one, Written) for one in beams)
    for one, alone in zip(beams, whole(writer, PROMPTS, wish(6, beam=1)), strict=True):
        assert isinstance(one, Written)
        assert one._replace(seconds=0.0).tokens != () != alone.tokens
    assert [one.tokens for one in whole(writer, PROMPTS, wish(6, beam=1))] == [
        one.tokens for one in whole(writer, PROMPTS, greedy)
    ]


def test_a_text_that_fails_does_not_take_the_others_with_it(folders: Folders) -> None:
    latent = open_writer(folders.latent)
    found = whole(latent, ("a", "class A"), wish(12, "exact", 0.04, 30))
    assert len(found) == 2
    assert {one.finish for one in found} >= {"failed"}
    for one in found:
        assert (one.error is not None) == (one.finish == "failed")


def test_what_needs_probabilities_is_refused_where_there_is_no_token_head(folders: Folders) -> None:
    without = replace(open_writer(folders.latent), model=untrained_model(token_layers=0))
    for wanted in (wish(best_of=2), wish(beam=2), replace(wish(), scores=True)):
        with pytest.raises(RefusedError, match="no token head"):
            next(write(without, ("a",), wanted))


def test_a_wish_that_is_not_possible_is_refused_before_anything_is_written(writer: Writer) -> None:
    for wanted, words in (
        (wish(0), "request 0: max_new_tokens = 0"),
        (wish(seed=2**63 - 1), f"request 1: seed = {2**63}"),
        (wish(batch=0), "batch = 0"),
        (wish(4, "tokens", 1.0, 200, 321), "request 0: top_k = 321 is more than the 320 tokens"),
    ):
        with pytest.raises(RefusedError, match=words):
            next(write(writer, ("a", "b"), wanted))


def test_the_usual_method_is_the_one_that_knows_the_values(folders: Folders) -> None:
    latent, token = open_writer(folders.latent), open_writer(folders.token)
    usual = [sampling_of(latent, None, temperature=t).method for t in (0.0, 0.5, 1.0, 1.3)]
    assert usual == ["vote", "head", "head", "tokens"]
    assert sampling_of(latent, None, top_k=5).method == sampling_of(latent, None, top_p=0.9).method == "tokens"
    assert sampling_of(token, None).method == "tokens"
    for method in (None, "head"):  # the share of all tokens is asked for by nobody
        assert sampling_of(latent, method, top_p=1.0) == sampling_of(latent, method)
