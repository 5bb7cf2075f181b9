"""Answers of a chat API: asked once, kept by request, so that whoever is stopped goes on without a repeated call."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import zstandard

from latentforge.errors import RefusedError
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.http.chat import ChatAnswer, ChatEntry, ChatPosition
from latentforge.teachers.http.flow import FlowControl
from latentforge.teachers.protocol import TeacherIdentity

TEMPERATURE = 1.0
"""Answers are drawn at T = 1: at any other the text is not what the rows beside it say."""

OF_ONE_ANSWER = frozenset({"not-finite", "too-few", "shifted"})
"""Failures of an answer that came, and would come again: kept as one, so that it is paid for once."""
OF_ONE_PROMPT = frozenset({"too-long", "refused-request"}) | OF_ONE_ANSWER
"""Failures that are one prompt's or one answer's own: it is dropped and counted, and the others are asked."""


class Chatter(Protocol):
    """A teacher of the capability *chat*, as :class:`latentforge.teachers.http.openai.OpenAITeacher` is one."""

    flow: FlowControl

    @property
    def identity(self) -> TeacherIdentity:
        """Who answers."""
        ...

    def chat(
        self, messages: Sequence[dict[str, str]], *, max_tokens: int, k: int, temperature: float, seed: int | None
    ) -> ChatAnswer:
        """One answer with its top-``k`` rows."""
        ...


@dataclass(frozen=True)
class Asking:
    """How each prompt is asked: at most ``max_tokens`` tokens of answer, ``k`` entries a row, drawn by ``seed``."""

    max_tokens: int
    k: int
    seed: int

    def key(self, identity: TeacherIdentity, prompt: str) -> bytes:
        """sha256 of the request and of who is asked."""
        asked = {"identity": identity.as_json(), "prompt": prompt, "temperature": TEMPERATURE, **asdict(self)}
        return hashlib.sha256(json.dumps(asked, sort_keys=True, separators=(",", ":")).encode()).digest()

    def seed_of(self, prompt: str) -> int:
        """The seed of one prompt's answer, below 2^31: equal prompts in other runs' seeds are answered anew."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}\0{prompt}".encode()).digest()[:4], "big") >> 1


class AnswerStore:
    """Answers by request on disk (SQLite); each is committed when it came, with a checksum over key and content."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._connection = sqlite3.connect(self.path, isolation_level=None)
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, value BLOB NOT NULL)")
        except sqlite3.DatabaseError as error:
            raise RefusedError(f"{path} is no store of answers: {error}", next="remove it and ask again") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM answers").fetchone()[0])

    def get(self, key: bytes) -> ChatAnswer | TeacherFailure | None:
        """The answer to a request, or why it was of no use; None where there is none, or where its bytes are damaged:
        it is asked again."""
        row = self._connection.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None or row[0][:32] != _checksum(key, row[0][32:]):
            return None
        return _read(zstandard.ZstdDecompressor().decompress(row[0][32:]))

    def put(self, key: bytes, answer: ChatAnswer | TeacherFailure) -> None:
        """Keep an answer, or what was wrong with it; it is on disk when this returns."""
        packed = zstandard.ZstdCompressor().compress(_written(answer))
        row = (key, _checksum(key, packed) + packed)
        self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", row)

    def close(self) -> None:
        """Close; everything lies in the one file."""
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._connection.execute("PRAGMA journal_mode=DELETE")
        self._connection.close()


def ask_all(
    teacher: Chatter, prompts: Sequence[str], store: AnswerStore, asking: Asking
) -> Iterator[tuple[int, ChatAnswer | TeacherFailure]]:
    """(index, answer) of every prompt as it is answered; a failure that is the prompt's own stands in its place.

    What is stored is not asked. At any other failure nothing further is asked, what was in flight is waited for and
    stored, and the failure is raised: run again, it goes on there.
    """
    keys = [asking.key(teacher.identity, prompt) for prompt in prompts]
    missing = []
    for number, key in enumerate(keys):
        found = store.get(key)
        if found is None:
            missing.append(number)
        else:
            yield number, found
    # Equal prompts are one request.
    first = {keys[number]: number for number in reversed(missing)}
    # Set by the thread that met it, before it could take another prompt.
    ended = threading.Event()
    failure: TeacherFailure | None = None

    def ask(prompt: str) -> ChatAnswer | TeacherFailure | None:
        """None where it is not asked any more."""
        if ended.is_set():
            return None
        try:
            return teacher.chat(
                [{"role": "user", "content": prompt}],
                max_tokens=asking.max_tokens,
                k=asking.k,
                temperature=TEMPERATURE,
                seed=asking.seed_of(prompt),
            )
        except TeacherFailure as error:
            if error.kind not in OF_ONE_PROMPT:
                ended.set()
            return error

    pool = ThreadPoolExecutor(teacher.flow.concurrency, thread_name_prefix="chat")
    try:
        ordered = sorted(first.items(), key=lambda one: one[1])
        asked = {pool.submit(ask, prompts[number]): key for key, number in ordered}
        for future in as_completed(asked):
            key, said = asked[future], future.result()
            if said is None:
                continue
            if isinstance(said, TeacherFailure) and said.kind not in OF_ONE_PROMPT:
                failure = failure or said
                continue
            if isinstance(said, ChatAnswer) or said.kind in OF_ONE_ANSWER:
                store.put(key, said)
            for number in missing:
                if keys[number] == key:
                    yield number, said
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if failure is not None:
        raise failure


def _written(answer: ChatAnswer | TeacherFailure) -> bytes:
    if isinstance(answer, TeacherFailure):
        return json.dumps({"unusable": answer.kind, "what": answer.what}, separators=(",", ":")).encode()
    value: dict[str, Any] = {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "usage": [answer.prompt_tokens, answer.completion_tokens],
        "positions": [
            [_entry(position.own), [_entry(one) for one in position.top], position.rest]
            for position in answer.positions
        ],
    }
    return json.dumps(value, separators=(",", ":")).encode()


def _entry(entry: ChatEntry) -> list[Any]:
    return [entry.token, None if entry.bytes is None else entry.bytes.hex(), entry.logprob]


def _read(content: bytes) -> ChatAnswer | TeacherFailure:
    value = json.loads(content)
    if "unusable" in value:
        return TeacherFailure(value["unusable"], value["what"])

    def entry(one: list[Any]) -> ChatEntry:
        return ChatEntry(one[0], None if one[1] is None else bytes.fromhex(one[1]), one[2])

    positions = tuple(ChatPosition(entry(own), tuple(map(entry, top)), rest) for own, top, rest in value["positions"])
    return ChatAnswer(value["text"], positions, value["finish_reason"], *value["usage"])


def _checksum(key: bytes, packed: bytes) -> bytes:
    return hashlib.blake2b(packed, digest_size=32, key=key).digest()
