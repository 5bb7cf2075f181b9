"""Answers of a chat API as training documents: each token by its bytes, each position with the teacher's own row.

The row of an answer's token was said after the prompt and the tokens before it. The document holds the answer alone, so
a student learns the teacher's text averaged over prompts; with answers drawn at T = 1 that average is exactly what its
targets come to, which is why no other temperature is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from latentforge.data.pieces import TokenBytes
from latentforge.data.special import special_tokens
from latentforge.data.tokenizer import Tokenizer
from latentforge.errors import RefusedError
from latentforge.targets.row import SequenceTargets
from latentforge.teachers.crossing import ABSENT
from latentforge.teachers.http.chat import ChatAnswer, ChatEntry

Dropped = Literal["empty", "unknown-bytes", "no-such-token", "ambiguous", "other-text"]
WHY: dict[Dropped, str] = {
    "empty": "the answer has no text",
    "unknown-bytes": "the server does not say the bytes of a token (a part of a character, written as U+FFFD)",
    "no-such-token": "a token's bytes are no token of the tokenizer",
    "ambiguous": "a token's bytes are those of several ids",
    "other-text": "the bytes of its tokens are not the answer's text",
}
_REPLACEMENT = "\ufffd".encode()


@dataclass(frozen=True)
class ChatDocument:
    """One answer: ``ids`` int64 ``[n]`` that end in EOS, and the row that predicts each of them.

    ``row_ids`` int32 and ``logprobs`` float32 ``[n, k]``, ``tail`` float32 ``[n]`` = log of the rest mass; entries
    without an id are absent, their mass is in the tail. ``said_end`` is whether the teacher ended it (then and only
    then the EOS may have a row), ``bytes`` the size of the text, ``canonical`` whether the tokenizer would have cut the
    text the same way.
    """

    ids: npt.NDArray[np.int64]
    row_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    tail: npt.NDArray[np.float32]
    said_end: bool
    bytes: int
    canonical: bool

    def in_chunks(self, chunk: int) -> ChatDocument:
        """The document up to a multiple of ``chunk`` tokens: its EOS again, without rows (see ``data.shards.pack``)."""
        more = -len(self.ids) % chunk
        if not more:
            return self
        return replace(
            self,
            ids=np.pad(self.ids, (0, more), mode="edge"),
            row_ids=np.pad(self.row_ids, ((0, more), (0, 0)), constant_values=ABSENT),
            logprobs=np.pad(self.logprobs, ((0, more), (0, 0)), constant_values=-np.inf),
            tail=np.pad(self.tail, (0, more)),
        )


class ChatReader:
    """Reads answers with one tokenizer: every token by its bytes, special ones by their text; nothing is guessed."""

    def __init__(self, tokenizer: Tokenizer, *, k: int, bos_id: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.k = k
        self.bos_id = bos_id
        self._bytes = TokenBytes.of(tokenizer)
        # What may end an answer: the chat's own end is the document's end.
        self._ends = {
            number for number, token in special_tokens(tokenizer.folder, tokenizer).added.items() if token.special
        }

    def read(self, answer: ChatAnswer) -> ChatDocument | Dropped:
        """The document of an answer, or why it is none."""
        positions = list(answer.positions)
        end = None
        if positions and self._is_end(positions[-1].own):
            end = positions.pop()
        if not answer.text or not positions:
            return "empty"
        ids: list[int] = []
        for position in positions:
            found = self._own(position.own)
            if isinstance(found, str):
                return found
            ids.append(found)
        if self._bytes.join(ids) != answer.text.encode():
            return "other-text"
        stopped = answer.finish_reason == "stop"
        rows = [*positions, end] if stopped and end is not None else positions
        row_ids = np.full((len(ids) + 1, self.k), ABSENT, dtype=np.int32)
        logprobs = np.full((len(ids) + 1, self.k), -np.inf, dtype=np.float32)
        tail = np.zeros(len(ids) + 1, dtype=np.float32)
        for at, position in enumerate(rows):
            row_ids[at], logprobs[at], tail[at] = self._row(position.top)
        canonical = self.tokenizer.backend.encode(answer.text, add_special_tokens=False).ids == ids
        first = [] if self.bos_id is None else [self.bos_id]
        if first:
            silent = np.full((1, self.k), ABSENT, dtype=np.int32)
            row_ids = np.concatenate([silent, row_ids])
            logprobs = np.concatenate([np.full((1, self.k), -np.inf, dtype=np.float32), logprobs])
            tail = np.concatenate([np.zeros(1, dtype=np.float32), tail])
        tokens = np.array([*first, *ids, self.tokenizer.eos_id], dtype=np.int64)
        size = len(answer.text.encode())
        return ChatDocument(tokens, row_ids, logprobs, tail, stopped, size, canonical)

    def _is_end(self, entry: ChatEntry) -> bool:
        number = self._bytes.special.get(entry.token)
        return (number is not None and number in self._ends) or entry.token == "" or entry.bytes == b""

    def _own(self, entry: ChatEntry) -> int | Dropped:
        ids = self._ids(entry)
        if ids is None:
            return "unknown-bytes"
        if not ids:
            return "no-such-token"
        return ids[0] if len(ids) == 1 else "ambiguous"

    def _ids(self, entry: ChatEntry) -> tuple[int, ...] | None:
        """The ids of an entry's bytes; None where the server does not say them."""
        raw = entry.bytes
        if raw is None or _REPLACEMENT in raw:
            # Servers write U+FFFD for a part of a character: which part is not known.
            return None
        return self._bytes.ids.get(raw, ())

    def _row(self, entries: Iterable[ChatEntry]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], np.float32]:
        """One row: entries that are one id each, the rest of the mass in the tail."""
        ids = np.full(self.k, ABSENT, dtype=np.int32)
        logprobs = np.full(self.k, -np.inf, dtype=np.float32)
        at, seen = 0, set()
        for entry in entries:
            number = self._entry(entry)
            if number is None or number in seen or at == self.k:
                continue
            seen.add(number)
            ids[at], logprobs[at] = number, entry.logprob
            at += 1
        if not at:
            return ids, logprobs, np.float32(0.0)
        rest = 1.0 - float(np.exp(logprobs[:at].astype(np.float64)).sum())
        return ids, logprobs, np.float32(np.log(rest)) if rest > 0.0 else np.float32(-np.inf)

    def _entry(self, entry: ChatEntry) -> int | None:
        if self._bytes.special.get(entry.token) in self._ends or entry.token == "":
            return self.tokenizer.eos_id
        ids = self._ids(entry)
        return ids[0] if ids is not None and len(ids) == 1 else None


@dataclass
class ChatTally:
    """What became of the answers: kept documents, dropped ones by reason, ends that the teacher did not say."""

    kept: int = 0
    cut: int = 0
    other_cuts: int = 0
    refused: int = 0
    refusal: str = ""  # the first one's own words
    dropped: Counter[Dropped] = field(default_factory=Counter)

    def refuse(self, why: str) -> None:
        """Count a prompt that got no answer."""
        self.refusal = self.refusal or why
        self.refused += 1

    def add(self, found: ChatDocument | Dropped) -> None:
        """Count one answer."""
        if isinstance(found, ChatDocument):
            self.kept += 1
            self.cut += not found.said_end
            self.other_cuts += not found.canonical
        else:
            self.dropped[found] += 1

    @property
    def total(self) -> int:
        """Answers read."""
        return self.kept + sum(self.dropped.values())

    def sentences(self) -> list[str]:
        """For the log."""
        said = [f"{self.kept} of {self.total} answers became documents"]
        for reason, count in sorted(self.dropped.items()):
            said.append(f"{count} answers were dropped: {WHY[reason]}")
        if self.refused:
            said.append(
                f"{self.refused} prompts were dropped: the server refused them, or its answer was not usable; "
                f"the first: {self.refusal}"
            )
        if self.cut:
            said.append(f"{self.cut} answers were cut at their length: their end is the packing's, without a row")
        if self.other_cuts:
            said.append(
                f"{self.other_cuts} answers are tokenized otherwise than the tokenizer would; kept as they were said"
            )
        return said

    def check(self) -> None:
        """Refuse a tokenizer that is not the API's: none of the first answers could be read with it."""
        if self.kept == 0 and self.total >= FIRST_ANSWERS:
            reasons = "; ".join(f"{count} times: {WHY[reason]}" for reason, count in sorted(self.dropped.items()))
            raise RefusedError(
                f"none of the first {self.total} answers can be read with the tokenizer of teacher.model ({reasons})",
                next="name in teacher.model the folder with the tokenizer of the model that the API serves",
            )

    def record(self) -> dict[str, object]:
        """For data.json."""
        return {
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
            "refused": self.refused,
            "cut": self.cut,
            "other_cuts": self.other_cuts,
        }


FIRST_ANSWERS = 8
"""So many answers that cannot be read, and none that can, are taken for another model's tokenizer."""


def packed_targets(
    documents: Iterable[ChatDocument], *, length: int, chunk: int = 1
) -> Iterable[tuple[npt.NDArray[np.int64], SequenceTargets]]:
    """Rows of ``length`` tokens cut from the documents one after the other, each with its ``length - 1`` targets; each
    document begins at a multiple of ``chunk``.

    Row i of a sequence's targets predicts its token i + 1, as everywhere; the first token of a sequence loses its row.
    """
    parts: list[ChatDocument] = []
    have = 0
    for document in documents:
        parts.append(document.in_chunks(chunk))
        have += len(parts[-1].ids)
        if have < length:
            continue
        ids, row_ids, logprobs, tail = (
            np.concatenate([getattr(one, name) for one in parts]) for name in ("ids", "row_ids", "logprobs", "tail")
        )
        for begin in range(0, have - length + 1, length):
            rows = slice(begin + 1, begin + length)
            yield ids[begin : begin + length], SequenceTargets(row_ids[rows], logprobs[rows], {1.0: tail[rows]})
        left = have - have % length
        rest = ChatDocument(ids[left:], row_ids[left:], logprobs[left:], tail[left:], True, 0, True)
        parts, have = ([rest], len(rest.ids)) if len(rest.ids) else ([], 0)
