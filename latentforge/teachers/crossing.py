"""A teacher's rows for a student of another tokenizer: the same bytes, aligned, ids mapped by their bytes.

Which rows carry over, and why only these (the aligned-chunk view of Minixhofer et al., "Cross-Tokenizer Distillation
via Approximate Likelihood Matching", arXiv:2503.20083; matched events with one bucket for the rest of the mass as in
"Common-Support Distillation", arXiv:2610.28895):

* A student token whose bytes are one span carries KD: both sides stand before the same bytes with the same past.
* Where the span is one teacher token, each entry of the teacher's row becomes the student token of the same bytes; an
  entry without one adds its mass to the tail. The mass of the row stays 1.
* Where the span is several teacher tokens (T = 1 only), the events are the first teacher token that leaves the
  observed path, with the path before it: its probability is the product along the path, its bytes those of all of them.
* A span of several student tokens carries nothing: the teacher says nothing of a boundary in its midst.

What this does not give: a teacher token and a student token of the same bytes are not quite the same event, since one
tokenizer may never put a boundary there that the other always puts; mass on tokens that only the teacher has tells the
student just that it lies outside; and nothing is learnt at positions that do not carry.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from latentforge.data.pieces import TokenBytes
from latentforge.data.special import special_tokens
from latentforge.data.tokenizer import Tokenizer
from latentforge.errors import RefusedError
from latentforge.targets.row import SequenceTargets
from latentforge.teachers.spans import Spans, align, boundaries

Tokens = npt.NDArray[np.int64]
ABSENT = -1
_NO_MASS = float("-inf")


@dataclass(frozen=True)
class Crossing:
    """One student sequence as the teacher reads it.

    ``teacher`` are the teacher's tokens, int64 ``[n]``, of the student's bytes; ``altered`` the indices of teacher
    tokens that stand for other bytes here than elsewhere (a first piece whose added blank is not in the text).
    """

    teacher: Tokens
    spans: Spans
    altered: frozenset[int]

    def carried(self) -> tuple[Tokens, Tokens]:
        """(student, teacher token) of spans of one token each; (student, first, last + 1) where the teacher has more.

        A token that is the first of its sequence is given, not predicted: it is in neither.
        """
        spans = self.spans
        single = (spans.student[:, 1] - spans.student[:, 0] == 1) & (spans.student[:, 0] >= 1)
        single &= (spans.teacher[:, 0] >= 1) & (spans.teacher[:, 1] > spans.teacher[:, 0])
        if self.altered:
            single &= ~np.isin(spans.teacher[:, 0], list(self.altered))
        table = np.concatenate([spans.student[single, :1], spans.teacher[single]], axis=1)
        one = table[:, 2] - table[:, 1] == 1
        return table[one][:, :2], table[~one]


@dataclass(frozen=True)
class MappedRows:
    """Targets of one student sequence of L tokens: ids int32 and logprobs float32 ``[L-1, k]``, tail float32 ``[L-1]``.

    Entries of a row that are not used are absent (id -1). Where ``carries`` (bool ``[L-1]``) is False all of them are
    and the tail is 0: the whole mass lies outside, so the row has no KD loss and no gradient.
    """

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    tail: npt.NDArray[np.float32]
    carries: npt.NDArray[np.bool_]


class Bridge:
    """Between a teacher's tokenizer and a student's: ids by bytes, special tokens by role."""

    def __init__(self, teacher: Tokenizer, student: Tokenizer) -> None:
        self.teacher, self.student = teacher, student
        self._teacher_bytes, self._student_bytes = TokenBytes.of(teacher), TokenBytes.of(student)
        roles = special_tokens(teacher.folder, teacher), special_tokens(student.folder, student)
        self._before = roles[0].before
        pairs = [(roles[0].roles.get(role), roles[1].roles.get(role)) for role in ("eos", "bos")]
        self._roles = {one: other for other, one in pairs if one is not None and other is not None}
        # One id a side: where several ids stand for the same bytes, the lowest is what the tokenizer's model makes.
        known = {piece: ids[0] for piece, ids in self._student_bytes.ids.items()}
        self.id_map = np.full(teacher.vocab_size, ABSENT, dtype=np.int32)
        for piece, ids in self._teacher_bytes.ids.items():
            self.id_map[ids[0]] = known.get(piece, ABSENT)
        for student_id, teacher_id in self._roles.items():
            self.id_map[teacher_id] = student_id
        self._known = known

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know of the two vocabularies."""
        mapped, tokens = int((self.id_map >= 0).sum()), self.teacher.vocab_size
        said = [
            f"cross-tokenizer: {mapped} of the teacher's {tokens} tokens have a student token of the same bytes; "
            "the mass of the others goes to the tail"
        ]
        if self._before:
            said.append(f"the teacher reads ids {list(self._before)} before each document, as its tokenizer puts them")
        return tuple(said)

    def cross(self, tokens: Tokens) -> Crossing:
        """The teacher's tokens for a student's sequence int64 ``[L]``, and the spans of both.

        A sequence may begin and end inside a character: the teacher starts with the first whole one. It ends before
        bytes that are no UTF-8 or that the teacher's normaliser changes, since its past would be another one there.
        """
        widths = self._student_bytes.widths(tokens)
        ids: list[int] = list(self._before)
        wide: list[int] = [0] * len(ids)
        altered: set[int] = set()
        start = 0
        for number, (segment, special) in enumerate(_segments(tokens.tolist(), self._student_bytes)):
            raw = self._student_bytes.join(segment)
            if number == 0:
                start = _continuation(raw)
                raw = raw[start:]
            text, whole = _text(raw)
            found = self._encoded(text)
            if found is None:
                break
            at, added, blank = found
            if blank:
                altered.add(len(ids))
            ids += at
            wide += added
            if not whole or special is None:
                break
            role = self._roles.get(special)
            if role is None:
                break
            if self._before == (role,) and ids and ids[-1] == role and wide[-1] == 0:
                wide[-1] = 1  # the student's text says the BOS that the teacher was given already
                continue
            ids.append(role)
            wide.append(1)
            if special == self.student.eos_id:
                ids += self._before
                wide += [0] * len(self._before)
        bounds = boundaries(np.array(wide, dtype=np.int64), start)
        return Crossing(np.array(ids, dtype=np.int64), align(bounds, boundaries(widths)), frozenset(altered))

    def _encoded(self, text: str) -> tuple[list[int], list[int], bool] | None:
        """(ids, bytes of each, whether the first piece has a blank more than the text); None where bytes changed."""
        ids = self.teacher.backend.encode(text, add_special_tokens=False).ids
        pieces = [self._teacher_bytes.pieces[i] for i in ids]
        if any(piece is None for piece in pieces):
            return None
        wide = [len(piece or b"") for piece in pieces]
        joined, wanted = b"".join(piece or b"" for piece in pieces), text.encode()
        if joined == wanted:
            return ids, wide, False
        if joined == b" " + wanted:
            return ids, [wide[0] - 1, *wide[1:]], True
        return None

    def map_rows(self, crossing: Crossing, rows: SequenceTargets, *, length: int, temperature: float) -> MappedRows:
        """The teacher's rows for :attr:`Crossing.teacher` as rows of the student's sequence of ``length`` tokens.

        ``rows`` must hold the tail of ``temperature``. At T other than 1 spans of several teacher tokens carry nothing:
        the product of tempered rows is no tempered probability.
        """
        if len(rows.ids) != len(crossing.teacher) - 1:
            raise RefusedError(f"{len(rows.ids)} rows for {len(crossing.teacher)} tokens of the teacher")
        k = rows.ids.shape[1]
        ids = np.full((length - 1, k), ABSENT, dtype=np.int32)
        logprobs = np.full((length - 1, k), _NO_MASS, dtype=np.float32)
        tail = np.zeros(length - 1, dtype=np.float32)
        carries = np.zeros(length - 1, dtype=np.bool_)
        one, many = crossing.carried()
        if len(one):
            to, source = one[:, 0] - 1, one[:, 1] - 1
            ids[to], logprobs[to], tail[to] = self._by_bytes(rows, source, temperature)
            carries[to] = ids[to, 0] >= 0
            tail[to] = np.where(carries[to], tail[to], 0.0)
        if temperature == 1.0:
            for student, first, last in many.tolist():
                found = self._along(crossing.teacher, rows, first, last, k)
                if found is not None and found[0][0] >= 0:
                    row = student - 1
                    ids[row], logprobs[row], tail[row] = found
                    carries[row] = True
        return MappedRows(ids, logprobs, tail, carries)

    def _by_bytes(self, rows: SequenceTargets, source: Tokens, temperature: float) -> tuple[Any, Any, Any]:
        ids, logprobs = rows.ids[source], rows.logprobs[source]
        mapped = np.where(ids >= 0, self.id_map[ids], ABSENT).astype(np.int32)
        known = mapped >= 0
        lost = np.where(known | (ids < 0), _NO_MASS, logprobs.astype(np.float64) / temperature)
        tail = np.logaddexp(rows.tails[temperature][source].astype(np.float64), _logsumexp(lost))
        order = np.argsort(~known, axis=1, kind="stable")
        mapped = np.take_along_axis(mapped, order, axis=1)
        kept = np.take_along_axis(np.where(known, logprobs, _NO_MASS), order, axis=1)
        return mapped, kept.astype(np.float32), np.minimum(tail, 0.0 if temperature == 1.0 else np.inf)

    def _along(self, path: Tokens, rows: SequenceTargets, first: int, last: int, k: int) -> Any:
        """The row of a student token that the teacher wrote as ``path[first:last]``; None where the path's own
        probability is not in the rows."""
        events: dict[int, float] = {}
        done, before = 0.0, b""
        for at in range(first, last):
            ids, logprobs = rows.ids[at - 1], rows.logprobs[at - 1].astype(np.float64)
            own = np.flatnonzero(ids == path[at])
            if at < last - 1 and not len(own):
                return None
            for number, logprob in zip(ids.tolist(), logprobs.tolist(), strict=True):
                if number < 0 or (at < last - 1 and number == path[at]):
                    continue
                piece = self._teacher_bytes.pieces[number]
                if piece is None:
                    to = int(self.id_map[number]) if not before else ABSENT
                else:
                    to = self._known.get(before + piece, ABSENT)
                if to >= 0:
                    events[to] = float(np.logaddexp(events.get(to, _NO_MASS), done + logprob))
            if at < last - 1:
                done += float(logprobs[own[0]])
                before += self._teacher_bytes.pieces[int(path[at])] or b""
        kept = heapq.nsmallest(k, events.items(), key=lambda event: (-event[1], event[0]))
        ids = np.full(k, ABSENT, dtype=np.int32)
        out = np.full(k, _NO_MASS, dtype=np.float32)
        ids[: len(kept)] = [number for number, _ in kept]
        out[: len(kept)] = [logprob for _, logprob in kept]
        rest = max(0.0, 1.0 - float(np.exp(out.astype(np.float64)).sum()))
        return ids, out, np.float32(np.log(rest)) if rest > 0 else np.float32(_NO_MASS)


def _segments(tokens: list[int], known: TokenBytes) -> Iterator[tuple[list[int], int | None]]:
    """(tokens of a stretch of text, the special token that ends it) in order; None at the end of the sequence."""
    begin = 0
    for at, number in enumerate(tokens):
        if known.pieces[number] is None:
            yield tokens[begin:at], number
            begin = at + 1
    yield tokens[begin:], None


def _continuation(raw: bytes) -> int:
    """How many bytes at the start belong to a character that began before."""
    count = 0
    while count < min(3, len(raw)) and raw[count] & 0xC0 == 0x80:
        count += 1
    return count


def _text(raw: bytes) -> tuple[str, bool]:
    """The text up to the first byte that is no UTF-8, and whether that is all of it."""
    try:
        return raw.decode("utf-8"), True
    except UnicodeDecodeError as error:
        return raw[: error.start].decode("utf-8"), False


def _logsumexp(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """log Σ exp over the last axis; minus infinity of nothing."""
    top = values.max(axis=1)
    safe = np.where(np.isneginf(top), 0.0, top)
    with np.errstate(divide="ignore"):
        found: npt.NDArray[np.float64] = safe + np.log(np.exp(values - safe[:, None]).sum(axis=1))
    return found
