"""An answer of a chat API becomes a document by its tokens' bytes, with its rows, or it is dropped and counted."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentforge.data import ShardSet
from latentforge.data.pieces import TokenBytes
from latentforge.data.shards import pack, shard_dtype
from latentforge.data.tokenizer import Tokenizer
from latentforge.errors import RefusedError
from latentforge.targets.row import check_targets
from latentforge.teachers.answers import AnswerStore, Asking, ask_all
from latentforge.teachers.documents import ChatDocument, ChatReader, ChatTally, packed_targets
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.http.chat import ChatAnswer, ChatEntry, ChatPosition
from latentforge.teachers.http.flow import FlowControl
from latentforge.teachers.protocol import TeacherIdentity

EOS_TEXT = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer(shards: ShardSet) -> Tokenizer:
    return shards.tokenizer()


def position(own: bytes, others: Sequence[tuple[bytes, float]] = (), *, probability: float = 0.5) -> ChatPosition:
    """A row that says ``own`` with ``probability`` and the others with theirs."""

    def entry(raw: bytes, value: float) -> ChatEntry:
        return ChatEntry(raw.decode("utf-8", "replace"), raw, math.log(value))

    top = sorted([(own, probability), *others], key=lambda one: -one[1])
    rest = 1 - sum(value for _, value in top)
    first = entry(own, probability)
    return ChatPosition(first, tuple(entry(*one) for one in top), math.log(rest) if rest > 0 else -math.inf)


def answer_of(tokenizer: Tokenizer, text: str, *, finish: str = "length", end: bool = False) -> ChatAnswer:
    """``text`` as a server that has this tokenizer says it."""
    known = TokenBytes.of(tokenizer)
    ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
    positions = [position(known.join([number]), [(b"#", 0.25)]) for number in ids]
    if end:
        positions.append(position(EOS_TEXT.encode(), [(b"a", 0.25)]))
    return ChatAnswer(text, tuple(positions), finish, None, None)


def read(tokenizer: Tokenizer, answer: ChatAnswer, *, k: int = 4) -> Any:
    return ChatReader(tokenizer, k=k).read(answer)


def test_an_answer_becomes_its_tokens_with_a_row_for_each(tokenizer: Tokenizer) -> None:
    found = read(tokenizer, answer_of(tokenizer, "the other x", finish="stop", end=True))
    wanted = tokenizer.backend.encode("the other x", add_special_tokens=False).ids
    assert found.ids.tolist() == [*wanted, tokenizer.eos_id]
    assert found.row_ids[:, 0].tolist() == found.ids.tolist()  # the end has the teacher's row too
    assert np.exp(found.logprobs[:, :2]) == pytest.approx(np.array([[0.5, 0.25]] * len(found.ids)))
    assert np.exp(found.tail) == pytest.approx(0.25)
    assert (found.row_ids[:, 2:] == -1).all()
    assert found.said_end
    assert found.canonical


def test_the_end_of_an_answer_that_was_cut_has_no_row(tokenizer: Tokenizer) -> None:
    found = read(tokenizer, answer_of(tokenizer, "the other"))
    assert found.ids[-1] == tokenizer.eos_id
    assert (found.row_ids[-1] == -1).all()
    assert found.tail[-1] == 0.0
    assert not found.said_end


def test_an_entry_that_is_no_token_gives_its_mass_to_the_tail(tokenizer: Tokenizer) -> None:
    own = position(b"t", [(b"not a token of it", 0.2), ("\ufffd".encode(), 0.1), (b"h", 0.1)], probability=0.4)
    found = read(tokenizer, ChatAnswer("t", (own,), "length", None, None))
    ids = [tokenizer.backend.token_to_id(text) for text in "th"]
    assert found.row_ids[0].tolist() == [*ids, -1, -1]
    assert np.exp(found.tail[0]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("positions", "text", "why"),
    [
        ([], "", "empty"),
        ([position(b"not a token of it")], "not a token of it", "no-such-token"),
        ([position("\ufffd".encode())], "\ufffd", "unknown-bytes"),
        ([ChatPosition(ChatEntry("t", None, -1.0), (), 0.0)], "t", "unknown-bytes"),
        ([position(b"t")], "th", "other-text"),
        ([position(b"t"), position(b"t")], "t", "other-text"),
    ],
    ids=["empty", "no-such-token", "replacement", "no-bytes", "shorter", "longer"],
)
def test_an_answer_that_cannot_be_read_is_dropped_with_its_reason(
    tokenizer: Tokenizer, positions: list[ChatPosition], text: str, why: str
) -> None:
    assert read(tokenizer, ChatAnswer(text, tuple(positions), "length", None, None)) == why


def test_bytes_that_are_two_tokens_are_not_guessed(tokenizer: Tokenizer) -> None:
    reader = ChatReader(tokenizer, k=4)
    t, h = (tokenizer.backend.token_to_id(text) for text in "th")
    reader._bytes.ids[b"t"] = (t, h)
    assert reader.read(ChatAnswer("t", (position(b"t"),), "length", None, None)) == "ambiguous"
    # As an entry beside the token that was said it counts to the tail.
    found = reader.read(ChatAnswer("x", (position(b"x", [(b"t", 0.25)]),), "length", None, None))
    assert isinstance(found, ChatDocument)
    assert found.row_ids[0].tolist() == [tokenizer.backend.token_to_id("x"), -1, -1, -1]


def test_parts_of_characters_are_read_where_the_server_gives_their_bytes(tokenizer: Tokenizer) -> None:
    raw = "é".encode()
    found = read(tokenizer, ChatAnswer("é", tuple(position(raw[i : i + 1]) for i in range(2)), "length", None, None))
    assert TokenBytes.of(tokenizer).join(found.ids[:-1].tolist()) == raw


def test_a_tokenizer_that_is_not_the_apis_is_refused_after_the_first_answers() -> None:
    tally = ChatTally()
    for _ in range(8):
        tally.check()
        tally.add("no-such-token")
    with pytest.raises(RefusedError, match=r"none of the first 8 answers .*8 times: a token's bytes are no token"):
        tally.check()


def test_of_prompts_that_got_no_answer_the_first_reason_is_said() -> None:
    tally = ChatTally()
    for why in ("max_tokens=256 is too many", "gone"):
        tally.refuse(why)
    assert tally.refused == 2
    assert tally.sentences()[-1].endswith("the first: max_tokens=256 is too many")


def test_packed_rows_have_the_targets_of_the_token_that_follows(tokenizer: Tokenizer) -> None:
    texts = ["the other", "return x=1", "def import the", "other the other the"]
    documents = [read(tokenizer, answer_of(tokenizer, text)) for text in texts]
    stream = np.concatenate([one.ids for one in documents])
    length = 5
    packed = list(packed_targets(documents, length=length))
    assert len(packed) == len(stream) // length
    for number, (tokens, targets) in enumerate(packed):
        assert tokens.tolist() == stream[number * length : (number + 1) * length].tolist()
        check_targets(targets, k=4, temperatures=(1.0,), vocab_size=tokenizer.vocab_size)
        for row, follows in enumerate(tokens[1:]):
            assert targets.ids[row, 0] in (follows, -1)
            assert (targets.ids[row, 0] == -1) == (follows == tokenizer.eos_id)


def test_answers_in_chunks_are_the_rows_that_pack_writes_and_padding_has_no_targets(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    texts = ["the other", "return x=1", "def import the", "other the other the"]
    documents = [read(tokenizer, answer_of(tokenizer, text)) for text in texts]
    encoded = ((one.bytes, one.ids.astype(np.uint32)) for one in documents)
    path, length, chunk = tmp_path / "rows.bin", 12, 4
    kept = pack(encoded, path, vocab_size=tokenizer.vocab_size, sequence_length=length, limit=None, chunk=chunk)
    rows = np.fromfile(path, dtype=shard_dtype(tokenizer.vocab_size)).reshape(-1, length)
    found = list(packed_targets(documents, length=length, chunk=chunk))
    assert len(found) == kept.rows == len(rows) > 1
    padding = 0
    for written, (tokens, targets) in zip(rows, found, strict=True):
        assert written.tolist() == tokens.tolist()
        check_targets(targets, k=4, temperatures=(1.0,), vocab_size=tokenizer.vocab_size)
        for row, follows in enumerate(tokens[1:]):
            padding += bool(follows == tokens[row] == tokenizer.eos_id)
            assert (targets.ids[row, 0] == -1) == (follows == tokenizer.eos_id)
    assert padding, "the texts were meant to leave places"


@dataclass
class Api:
    """A chat API that answers from a function and counts what it was asked."""

    tokenizer: Tokenizer
    fails: dict[str, TeacherFailure] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    flow: FlowControl = field(default_factory=lambda: FlowControl(concurrency=2))
    lock: threading.Lock = field(default_factory=threading.Lock)
    third: threading.Event = field(default_factory=threading.Event)

    @property
    def identity(self) -> TeacherIdentity:
        return TeacherIdentity("served:api", "unstated", "served", self.tokenizer.sha256)

    def chat(self, messages: Any, *, max_tokens: int, k: int, temperature: float, seed: int | None) -> ChatAnswer:
        prompt = messages[0]["content"]
        with self.lock:
            self.asked.append(prompt)
            if len(self.asked) == 3:
                self.third.set()
        assert temperature == 1.0
        if prompt in self.fails:
            raise self.fails[prompt]
        return answer_of(self.tokenizer, f"the {prompt}")


ASKING = Asking(16, 4, 7)


def test_what_was_answered_is_not_asked_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    api = Api(tokenizer)
    prompts = ["a", "b", "a", "c"]
    with AnswerStore(tmp_path / "a.sqlite") as store:
        first = dict(ask_all(api, prompts, store, ASKING))
    with AnswerStore(tmp_path / "a.sqlite") as store:
        again = dict(ask_all(api, prompts, store, ASKING))
        other = dict(ask_all(api, ["a"], store, Asking(17, 4, 7)))
    assert first == again
    assert first[0] == first[2] == other[0]
    assert sorted(api.asked) == ["a", "a", "b", "c"]  # "a" again for another request alone


def test_a_lost_server_keeps_what_it_said_and_one_bad_prompt_stops_nothing(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    api = Api(tokenizer, fails={"long": TeacherFailure("too-long", "no room")})
    prompts = ["long", *"abcdefgh"]
    api.fails["f"] = TeacherFailure("timeout", "gone")
    with AnswerStore(tmp_path / "a.sqlite") as store:
        with pytest.raises(TeacherFailure, match="gone"):
            dict(ask_all(api, prompts, store, ASKING))
        kept = len(store)
        assert 1 <= kept < 8
        before = len(api.asked)
        del api.fails["f"]
        found = dict(ask_all(api, prompts, store, ASKING))
    assert isinstance(found.pop(0), TeacherFailure)
    assert all(isinstance(one, ChatAnswer) for one in found.values())
    # Asked again: what was not stored, and the prompt that the server does not take.
    assert len(api.asked) - before == 8 - kept + 1


def test_after_the_end_of_a_server_nothing_is_asked_while_the_reader_is_busy(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prompts = [f"prompt {number}" for number in range(4)]
    api = Api(tokenizer, fails={prompt: TeacherFailure("timeout", "gone") for prompt in prompts[1:]})
    api.flow = FlowControl(concurrency=1)
    with AnswerStore(tmp_path / "a.sqlite") as store:
        answers = ask_all(api, prompts, store, ASKING)
        assert next(answers)[0] == 0
        # Nobody takes the next one for now: the thread that asks is on its own.
        assert not api.third.wait(0.3)
        with pytest.raises(TeacherFailure, match="gone"):
            dict(answers)
    assert api.asked == prompts[:2]


def test_a_damaged_answer_is_asked_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    api = Api(tokenizer)
    with AnswerStore(tmp_path / "a.sqlite") as store:
        dict(ask_all(api, ["a"], store, ASKING))
        (value,) = store._connection.execute("SELECT value FROM answers").fetchone()
        store._connection.execute("UPDATE answers SET value = ?", (value[:-1] + bytes([value[-1] ^ 1]),))
        dict(ask_all(api, ["a"], store, ASKING))
    assert api.asked == ["a", "a"]


def test_a_document_begins_with_the_bos_that_was_asked_for(tokenizer: Tokenizer) -> None:
    reader = ChatReader(tokenizer, k=4, bos_id=5)
    found = reader.read(answer_of(tokenizer, "the"))
    assert isinstance(found, ChatDocument)
    assert found.ids[0] == 5
    assert (found.row_ids[0] == -1).all()
    assert len(found.ids) == len(found.row_ids) == len(found.tail)
