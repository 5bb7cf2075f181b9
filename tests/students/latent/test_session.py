"""The latent student writes text: unequal prompts together, a cache that changes nothing, draws by their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.noise import gumbel
from latentforge.students.latent.codec import Codec, CodecShape
from latentforge.students.latent.generate import Batch, Keys, Request, Sampling, generate
from latentforge.students.latent.session import LatentModel

from .conftest import EOS, LATENT, VOCABULARY
from .conftest import untrained_model as model


def prompt(length: int, start: int = 1) -> tuple[int, ...]:
    return tuple(1 + (start * 7 + 3 * place) % (VOCABULARY - 1) for place in range(length))


def requests(chunk: int = 4) -> list[Request]:
    found = [
        Request(prompt(2 * chunk), 21, seed=3),
        Request((), 18, seed=3, sampling=Sampling("vote", 0.5, 30)),
        Request(prompt(1, 4), 25, seed=4, sampling=Sampling("vote", 0.0, 20)),
        Request(prompt(6 * chunk + 1, 2), 9, seed=-1),
    ]
    return found if chunk > 1 else [*found[:3], Request(prompt(6, 2), 9, seed=-1)]


def words(found: Any) -> set[int]:
    return {token for one in found for token in one.tokens}


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_a_batch_of_unequal_prompts_is_each_by_itself(chunk: int) -> None:
    together = generate(model(chunk), requests(chunk))
    assert together == [generate(model(chunk), [one])[0] for one in requests(chunk)]
    assert len(words(together)) > 3


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_cache_changes_nothing(chunk: int) -> None:
    assert generate(model(chunk), requests(chunk)) == generate(model(chunk, cache=False), requests(chunk))


def test_states_are_those_of_the_texts_without_padding() -> None:
    texts = [torch.tensor(prompt(n)).reshape(-1, 4) for n in (8, 0, 24)]
    for cache in (True, False):
        one = model(cache=cache)
        session = one.begin(texts)
        session.keep(torch.tensor([2, 0]))
        added = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
        session.advance(added)
        for row, text in enumerate((texts[2], texts[0])):
            whole = torch.cat([torch.full((1, 4), EOS), text, added[row : row + 1]])
            holds = torch.ones_like(whole).bool()
            holds[0, 1:] = False
            wanted = one.student.states(whole[None], holds[None])[0, -1]
            assert torch.allclose(session._state[row], wanted, atol=1e-5)


def test_a_text_begins_as_a_document_does_in_training() -> None:
    """The chunk before it is the last of another text: its EOS, and places that hold nothing."""
    one = model()
    before = torch.tensor([[[EOS, 9, 9, 9]]])
    wanted = one.student.states(before, torch.tensor([[[True, False, False, False]]]))[0, -1]
    assert torch.allclose(one.begin([torch.empty(0, 4, dtype=torch.int64)])._state[0], wanted, atol=1e-6)


def keys(seeds: list[int], positions: list[int]) -> Keys:
    return Keys(torch.tensor(seeds), torch.tensor(positions))


def test_a_draw_depends_on_its_key_and_number_alone() -> None:
    session = model().begin([torch.tensor(prompt(8, n)).reshape(-1, 4) for n in (1, 2, 3)])
    every = session.draw(torch.arange(3), keys([7, 8, 9], [2, 2, 2]), 0, 12, 1.0)
    assert every.shape == (3, 12, 4)
    later = session.draw(torch.tensor([2, 0]), keys([9, 7], [2, 2]), 5, 4, 1.0)
    assert torch.equal(later, every[[2, 0], 5:9])
    assert not torch.equal(session.draw(torch.arange(3), keys([7, 8, 9], [3, 3, 3]), 0, 12, 1.0), every)
    same = session.draw(torch.arange(3), keys([7, 7, 7], [2, 2, 2]), 0, 12, 1.0)
    assert len({str(row) for row in same.tolist()}) == 3  # the same noise after different texts
    assert len({tuple(chunk) for chunk in every[0].tolist()}) > 1


def test_a_tempered_head_is_told_the_temperature() -> None:
    one = model(tempered=True)
    session = one.begin([torch.tensor(prompt(8)).reshape(-1, 4)])
    row, key = torch.tensor([0]), keys([1], [2])
    hot, cold = (session.draw(row, key, 0, 30, temperature) for temperature in (1.0, 0.2))
    assert not torch.equal(hot, cold)
    sampling = Sampling("head", 0.2)
    assert generate(one, [Request(prompt(8), 8, 1, sampling)])[0].tokens[:4] == tuple(cold[0, 0].tolist())


def test_what_a_prompt_has_begun_is_completed_by_the_conditionals_of_its_tokens() -> None:
    one = model()
    session = one.begin([torch.tensor(prompt(4)).reshape(-1, 4)] * 3)
    begun = torch.tensor([[3, 4, EOS, EOS], [3, 9, EOS, EOS], [3, 4, 5, EOS]])
    lengths, temperature = torch.tensor([2, 2, 3]), torch.tensor([0.0, 0.0, 0.7])
    found = session.complete(torch.arange(3), keys([5, 5, 5], [1, 1, 1]), begun, lengths, temperature)
    assert torch.equal(found[:, :2], begun[:, :2])
    assert found[2, 2] == 5
    assert found[0].tolist() != found[1].tolist()

    def logits(text: Tensor, place: int) -> Tensor:
        return one.student.token_rows(session._state[:1], text[None])[0, place] @ one.student.table.weight.T

    assert found[0, 2] == logits(torch.tensor([3, 4, 1, 1]), 2).argmax()
    assert found[0, 3] == logits(torch.tensor([3, 4, int(found[0, 2]), 1]), 3).argmax()
    many = torch.arange(40)  # a key each for the same place
    found = session.complete(
        many * 0, Keys(many, many), begun[2:].repeat(40, 1), lengths[2:].repeat(40), torch.full((40,), 0.7)
    )
    noise = gumbel(many[:, None], (many * 4 + 3)[:, None], torch.arange(VOCABULARY))
    wanted = (logits(torch.tensor([3, 4, 5, 1]), 3) / 0.7 + noise).argmax(-1)
    assert torch.equal(found[:, 3], wanted)
    assert len(wanted.unique()) > 3


def test_a_codec_of_another_student_is_refused_by_what_differs() -> None:
    one = model()
    with pytest.raises(RefusedError, match="chunk is 4 of the student and 2 of the codec"):
        LatentModel(one.student, Codec(CodecShape(VOCABULARY, 2, LATENT, 16, 24)), eos_id=EOS)


def test_a_student_without_a_token_head_refuses_a_begun_chunk_before_it_writes() -> None:
    with pytest.raises(RefusedError, match="a prompt of 5 tokens begins a chunk of 4"):
        generate(model(token_layers=0), [Request(prompt(5), 4)])
    assert len(generate(model(token_layers=0), [Request(prompt(4), 4)])[0].tokens) <= 4


def test_the_lowest_temperature_is_one_of_a_begun_chunk_too() -> None:
    """Rounded to fp32 it lies below the lowest that tokens are drawn at."""
    (found,) = generate(model(tempered=True), [Request(prompt(5), 8, sampling=Sampling("head", 1e-4))])
    assert len(found.tokens) == 8 or found.finish == "eos"


def test_a_saved_student_writes_what_it_wrote_before_and_not_with_another_codec(tmp_path: Path) -> None:
    one = model()
    known = {"eos_id": EOS, "tokenizer_sha256": "a" * 64}
    digest = one.codec.save(tmp_path / "codec", **known, latent_std=1.0).digest
    one.student.save(tmp_path / "student", **known, codec_sha256=digest)
    opened = LatentModel.open(tmp_path / "student", tmp_path / "codec", tokenizer_sha256="a" * 64)
    assert generate(opened, requests()) == generate(one, requests())
    with pytest.raises(RefusedError, match="tokenizer"):
        LatentModel.open(tmp_path / "student", tmp_path / "codec", tokenizer_sha256="b" * 64)
    with torch.no_grad():
        one.codec.decoder_in.weight.add_(1)
    one.codec.save(tmp_path / "other", **known, latent_std=1.0)
    with pytest.raises(RefusedError, match="a student of codec"):
        LatentModel.open(tmp_path / "student", tmp_path / "other")


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("chunk", [1, 4])
def test_texts_that_join_and_leave_a_batch_are_those_by_themselves(chunk: int, cache: bool) -> None:
    asked = dict(enumerate(requests(chunk)))
    batch, found = Batch(model(chunk, cache=cache)), {number: list[int]() for number in asked}
    order, steps = [0, 3, 1, 2], 0  # the longest prompt joins a shorter one, and shorter ones join it
    while order or len(batch):
        if order and steps % 2 == 0:
            batch.join({order[0]: asked[order.pop(0)]})
        for piece in batch.step():
            found[piece.request] += piece.tokens
        steps += 1
    for number, tokens in found.items():
        assert tokens == list(generate(model(chunk, cache=cache), [asked[number]])[0].tokens)


@pytest.mark.parametrize("cache", [True, False])
def test_a_batch_that_never_ends_holds_no_more_than_its_texts_do(cache: bool) -> None:
    batch = Batch(model(cache=cache))
    for number in range(40):
        batch.join({number: Request(prompt(8), 16)})
        batch.step()
        batch.step()
    session = batch._session
    places = session._holds.shape[1] if not cache else session._cache.layers.get_seq_length()  # type: ignore
    assert places <= 1 + 2 + 4 + 1
