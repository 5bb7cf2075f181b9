"""Generation: prompts intact, exact ends, and an answer that depends on its request alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from latentforge.errors import FailedError, RefusedError
from latentforge.students.latent.generate import Batch, Generated, Keys, Request, Sampling, generate, stream

from .conftest import uniforms

EOS, VOCABULARY = 0, 50


@dataclass
class StandIn:
    """A model whose next chunk depends on the whole text: one of three, drawn with 0.6, 0.3 and 0.1."""

    chunk: int = 4
    eos_id: int = EOS
    vocab_size: int = VOCABULARY
    tempered: bool = False
    greedy: bool = False
    completes: bool = True
    ends: bool = False  # whether chunks may hold an EOS
    seen: list[list[int]] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    advanced: int = 0

    def begin(self, texts: Sequence[Tensor]) -> StandInSession:
        self.seen = [text.flatten().tolist() for text in texts]
        return StandInSession(self, [list(text) for text in self.seen])

    def next_of(self, text: list[int], which: int) -> list[int]:
        bits = hashlib.sha256(repr((text, which)).encode()).digest()
        low = 0 if self.ends and bits[20] % 3 == 0 else 1
        return [low + byte % (8 if low == 0 else VOCABULARY - 1) for byte in bits[: self.chunk]]


@dataclass
class StandInSession:
    model: StandIn
    texts: list[list[int]]

    def draw(self, rows: Tensor, keys: Keys, first: int, count: int, temperature: float) -> Tensor:
        assert temperature == 1
        self.model.drawn.append(len(rows) * count)
        found = uniforms(keys.seeds[:, None], keys.positions[:, None], torch.arange(first, first + count)[None])
        which = (found > 0.6).long() + (found > 0.9).long()
        texts = [self.texts[row] for row in rows]
        pairs = zip(texts, which.tolist(), strict=True)
        return torch.tensor([[self.model.next_of(text, one) for one in draws] for text, draws in pairs])

    def complete(
        self,
        rows: Tensor,
        keys: Keys,
        begun: Tensor,
        lengths: Tensor,
        temperature: Tensor,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        found = begun.clone()
        for at, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
            text = self.texts[row] + begun[at, :length].tolist()
            found[at, length:] = torch.tensor(self.model.next_of(text, int(keys.seeds[at]) % 3))[length:]
        return found

    def keep(self, rows: Tensor) -> None:
        self.texts = [self.texts[row] for row in rows]

    def advance(self, chunks: Tensor) -> None:
        self.model.advanced += 1
        self.texts = [text + chunk for text, chunk in zip(self.texts, chunks.tolist(), strict=True)]

    def join(self, other: StandInSession) -> None:
        self.texts += other.texts


def prompt(length: int, start: int = 1) -> tuple[int, ...]:
    return tuple(1 + (start * 7 + 3 * place) % (VOCABULARY - 1) for place in range(length))


@pytest.mark.parametrize("length", range(9))
@pytest.mark.parametrize("asked", [1, 3, 4, 9])
def test_a_prompt_of_any_length_is_returned_intact_with_as_many_tokens_as_were_asked_for(
    length: int, asked: int
) -> None:
    model = StandIn()
    (found,) = generate(model, [Request(prompt(length), asked)])
    assert found.prompt == prompt(length)
    assert (len(found.tokens), found.finish) == (asked, "length")
    assert model.seen == [list(prompt(length)[: length // 4 * 4])]  # whole chunks, and no padding
    begun = -length % 4
    assert found.steps == (begun > 0) + -(-max(0, asked - begun) // 4)


def test_what_is_left_of_a_prompt_is_completed_and_not_drawn_again() -> None:
    model = StandIn()
    (found,) = generate(model, [Request(prompt(6), 2, seed=1)])
    assert list(found.tokens) == model.next_of(list(prompt(6)), 1)[2:]
    assert model.drawn == []
    assert found.draws == 0


def test_nothing_follows_the_end_of_a_text() -> None:
    model = StandIn(ends=True)
    found = generate(model, [Request(prompt(n, n), 60, seed=n) for n in range(1, 60)])
    ended = [one for one in found if one.finish == "eos"]
    assert len(ended) > 20
    for one in ended:
        assert one.tokens.index(EOS) == len(one.tokens) - 1
    assert all(EOS not in one.tokens and len(one.tokens) == 60 for one in found if one.finish == "length")


def test_a_text_that_is_over_is_not_drawn_for() -> None:
    model = StandIn()
    generate(model, [Request(prompt(4), 4), Request(prompt(4), 12)])
    assert model.drawn == [2, 1, 1]


def requests() -> list[Request]:
    return [
        Request(prompt(5), 11, seed=3, sampling=Sampling("vote", 0.5, 40)),
        Request(prompt(8), 7, seed=3),
        Request((), 9, seed=2**63 - 1, sampling=Sampling("exact", 0.7, 1000)),
        Request(prompt(3), 13, seed=-5, sampling=Sampling("vote", 0.0, 30)),
    ]


@pytest.mark.parametrize("ends", [False, True])
def test_a_batch_of_four_is_the_four_by_themselves(ends: bool) -> None:
    together = generate(StandIn(ends=ends), requests())
    assert together == [generate(StandIn(ends=ends), [one])[0] for one in requests()]
    assert generate(StandIn(ends=ends), requests()[::-1]) == together[::-1]


def test_a_request_is_drawn_by_its_seed() -> None:
    def tokens(seed: int) -> Generated:
        return generate(StandIn(), [Request(prompt(4), 40, seed=seed)])[0]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_greedy_takes_the_most_frequent_chunk_at_each_step() -> None:
    model = StandIn()
    (found,) = generate(model, [Request(prompt(4), 12, sampling=Sampling("vote", 0.0, 100))])
    text = list(prompt(4))
    for _ in range(3):
        text += model.next_of(text, 0)
    assert found.tokens == tuple(text[4:])
    assert found.draws == 300


def test_a_vote_of_many_draws_makes_them_in_parts() -> None:
    model = StandIn()
    many = Sampling("vote", 0.0, 2500)
    assert generate(model, [Request(prompt(4), 4, sampling=many)])[0].draws == 2500
    assert model.drawn == [1024, 1024, 452]


def test_chunks_that_differ_after_their_end_alone_are_one_outcome() -> None:
    class Ending(StandIn):
        def next_of(self, text: list[int], which: int) -> list[int]:
            """Two ways to say the same end, 0.3 and 0.1, beside 0.6."""
            return [[7, 8, 9, 9], [5, EOS, 3, 3], [5, EOS, 4, 4]][which]

    found = generate(Ending(), [Request((), 4, seed, Sampling("exact", 0.5, 1000)) for seed in range(1000)])
    share = sum(one.tokens == (5, EOS) for one in found) / 1000
    assert share == pytest.approx(0.4**2 / (0.4**2 + 0.6**2), abs=0.045)  # 0.31; as two outcomes it would be 0.22


def test_a_piece_is_there_before_the_next_step_is_computed() -> None:
    model = StandIn()
    pieces = stream(model, [Request(prompt(4), 12)])
    for steps in range(3):
        assert len(next(pieces).tokens) == 4
        assert model.advanced == steps
    assert list(pieces) == []
    assert model.advanced == 2


def test_one_request_that_fails_does_not_end_the_others() -> None:
    class Flat(StandIn):
        def next_of(self, text: list[int], which: int) -> list[int]:
            return [1 + len(text), which + 1, which + 1, which + 1]

    both = [Request(prompt(4), 8, sampling=Sampling("exact", 0.05, 20)), Request(prompt(4), 8)]
    pieces = list(stream(Flat(), both))
    failed = [piece for piece in pieces if piece.request == 0]
    assert [(piece.tokens, piece.finish, piece.draws) for piece in failed] == [((), "failed", 20)]
    assert "none of 20 draws was accepted at temperature = 0.05" in str(failed[0].error)
    assert sum(len(piece.tokens) for piece in pieces if piece.request == 1) == 8
    with pytest.raises(FailedError, match="request 0, chunk 1"):
        generate(Flat(), both)


def test_an_answer_that_is_not_finite_is_an_error_and_no_token() -> None:
    class Broken(StandIn):
        def next_of(self, text: list[int], which: int) -> list[int]:
            return [3, -1, 3, 3]

    with pytest.raises(FailedError, match="request 0, chunk 1: the model's answer is not finite"):
        generate(Broken(), [Request(prompt(4), 8)])


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request((1, 50), 4), "token 50 at place 1 is no id below 50"),
        (Request((-1,), 4), "token -1 at place 0"),
        (Request((5, EOS, 5), 4), "token 0 at place 1 of the prompt is the end"),
        (Request((5,), 0), "max_new_tokens = 0"),
        (Request((5,), 4, seed=2**70), f"seed = {2**70}"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_its_value(request_: Request, words: str) -> None:
    model = StandIn()
    with pytest.raises(RefusedError, match=words):
        generate(model, [Request(prompt(4), 4), request_])
    assert model.drawn == []


def test_what_a_model_cannot_do_is_refused_before_anything_is_drawn() -> None:
    model = StandIn(completes=False)
    with pytest.raises(RefusedError, match="request 1: a prompt of 5 tokens begins a chunk of 4"):
        generate(model, [Request(prompt(4), 4), Request(prompt(5), 4)])
    with pytest.raises(RefusedError, match=r"request 0: temperature = 0\.5"):
        generate(model, [Request(prompt(4), 4, sampling=Sampling("head", 0.5))])
    with pytest.raises(RefusedError, match=r"request 0: temperature = 0\.0: .* above 0"):
        generate(StandIn(tempered=True), [Request(prompt(4), 4, sampling=Sampling("head", 0.0))])
    assert model.drawn == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("head", -0.1), "temperature = -0.1"),
        (("head", 1.5), "temperature = 1.5"),
        (("head", float("nan")), "temperature = nan"),
        (("head", 1e-5), "temperature = 1e-05"),
        (("exact", 1e-320), "temperature = 1e-320"),
        (("vote", 1e-320), "temperature = 1e-320"),
        (("exact", 0.0), "temperature = 0.0"),
        (("exact", 0.1, 9), "draws = 9"),
        (("vote", 0.4), "temperature = 0.4"),
        (("vote", 0.5, 1), "draws = 1"),
        (("beam", 1.0), "method = 'beam'"),
    ],
)
def test_a_way_of_sampling_that_there_is_not_is_refused_by_its_value(settings: tuple[str, float], words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        Sampling(*settings)


def test_no_requests_are_no_texts() -> None:
    assert generate(StandIn(), []) == []


def test_requests_that_join_and_leave_a_batch_are_those_by_themselves() -> None:
    batch, found = Batch(StandIn()), {number: list[int]() for number in range(6)}
    asked = {number: Request(prompt(3 * number, number), 14 + number, seed=number) for number in found}

    def step() -> None:
        for piece in batch.step():
            found[piece.request] += piece.tokens

    batch.join({0: asked[0], 1: asked[1]})
    step()
    batch.join({2: asked[2], 3: asked[3]})
    batch.leave({1})
    step()
    batch.join({4: asked[4]})
    batch.leave({0, 2})
    batch.join({5: asked[5]})
    assert len(batch) == 3
    while len(batch):
        step()
    for number, tokens in found.items():
        alone = list(generate(StandIn(), [asked[number]])[0].tokens)
        assert tokens == (alone[: len(tokens)] if number in (0, 1, 2) else alone)
    assert len(found[1]) < len(found[2]) + len(found[0]) < 30


def test_a_batch_that_all_have_left_begins_anew() -> None:
    batch = Batch(StandIn())
    assert batch.step() == []
    batch.join({7: Request(prompt(4), 8)})
    batch.step()
    batch.leave({7})
    assert (len(batch), batch.step()) == (0, [])
    batch.join({7: Request(prompt(4), 4)})
    assert [piece.finish for piece in batch.step()] == ["length"]


def test_a_request_that_cannot_join_changes_nothing() -> None:
    batch = Batch(StandIn())
    batch.join({1: Request(prompt(4), 8)})
    for requests in ({2: Request(prompt(4), 8), 3: Request((VOCABULARY,), 8)}, {1: Request(prompt(4), 8)}):
        with pytest.raises(RefusedError, match=r"request 3: token 50|request 1 is under way"):
            batch.join(requests)
    assert [piece.request for piece in batch.step()] == [1]


@pytest.mark.parametrize(
    ("texts", "sampling"),
    [
        (64, Sampling("vote", 0.5, draws=200)),
        (700, Sampling("exact", 0.5, draws=200)),
        (1500, Sampling()),
    ],
)
def test_a_batch_holds_no_more_draws_at_once_than_a_text_and_writes_the_same(texts: int, sampling: Sampling) -> None:
    asked = [Request(prompt(4), 4, seed, sampling) for seed in range(texts)]
    model = StandIn()
    together = generate(model, asked)
    assert max(model.drawn) <= 1024
    assert together[:20] == [generate(StandIn(), [one])[0] for one in asked[:20]]
    assert together[-1] == generate(StandIn(), asked[-1:])[0]


@pytest.mark.parametrize("way", [Sampling("exact", 0.02, draws=5000), Sampling("vote", 0.5, draws=5000)])
def test_a_text_that_nobody_waits_for_ends_within_its_step_and_its_neighbour_goes_on(way: Sampling) -> None:
    model = StandIn()
    batch = Batch(model, lambda: {0} if sum(model.drawn) > 100 else set())
    neighbour = Request(prompt(4), 8, 3)
    batch.join({0: Request(prompt(8), 8, 1, way), 1: neighbour})
    pieces = batch.step()
    assert sum(model.drawn) <= 100 + 1024 + 1
    assert len(batch) == 1
    pieces += batch.step()
    assert [piece.request for piece in pieces] == [1, 1]
    assert (*pieces[0].tokens, *pieces[1].tokens) == generate(StandIn(), [neighbour])[0].tokens


def test_a_temperature_below_0_is_not_said_to_be_too_high() -> None:
    with pytest.raises(RefusedError, match=r"temperature = -1 is not 0 or a number from") as refusal:
        Sampling("head", -1)
    assert refusal.value.next is None or "higher" not in refusal.value.next
