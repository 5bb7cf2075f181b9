"""How a teacher is asked to go on: after each chunk of a text, R chunks drawn from its own distribution.

A context is the text of a row up to the end of a chunk: padding is no part of it, and no teacher is shown any. What is
drawn is a sample of the joint distribution of the next K tokens, each drawn after those before it; the rows that a
teacher gives along a known text (``score``) are conditionals on that text, and drawing each position from its own row
would lose how the K tokens hang together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from latentforge.errors import RefusedError
from latentforge.targets.continued import ABSENT, Ids, contexts
from latentforge.teachers.protocol import Teacher, Tokens, check_temperature

_BETWEEN_DRAWS = 2**32


@dataclass(frozen=True)
class Continuing:
    """What is asked: ``count`` (R) chunks of ``chunk`` (K) tokens after each chunk, at each of the ``temperatures``.

    ``eos_id`` ends a document; ``seed`` is any whole number.
    """

    chunk: int
    count: int
    temperatures: tuple[float, ...]
    eos_id: int
    seed: int

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.count < 1:
            raise RefusedError(f"count = {self.count} chunks of {self.chunk} tokens: both are at least 1")
        for temperature in self.temperatures:
            check_temperature(temperature)

    def key(self, tokens: Tokens, temperature: float) -> int:
        """The noise's key of one sequence at one temperature, int64: of its tokens, not of its place among others."""
        content = np.ascontiguousarray(tokens, dtype="<i8").tobytes()
        digest = hashlib.sha256(f"continuations {self.seed} {float(temperature)!r} ".encode() + content).digest()
        return int.from_bytes(digest[:8], "little", signed=True)

    def positions(self, contexts: npt.NDArray[np.int64], place: int) -> npt.NDArray[np.int64]:
        """Where the noise of token ``place`` of each draw lies, int64 [R, contexts]: another for each number, context
        and place, whatever R is."""
        numbers = np.arange(self.count, dtype=np.int64)[:, None]
        return np.asarray(numbers * _BETWEEN_DRAWS + contexts * self.chunk + place)


class Continuer(Teacher, Protocol):
    """A teacher of the capability *sample*."""

    def continuations(self, sequences: Sequence[Tokens], asked: Continuing) -> Iterator[tuple[int, dict[float, Ids]]]:
        """Yield (index, chunks) of each of ``sequences`` (int64 [C * K]) as soon as they are drawn, in any order.

        Chunks are int32 [C-1, R, K] by temperature: place c goes on after the chunks up to c, and is -1 throughout
        where chunk c ends a document. What follows an EOS inside a chunk means nothing. Raises
        :class:`latentforge.teachers.failures.TeacherFailure`; what was yielded before stays true.
        """
        ...

    def close(self) -> None:
        """Give back connections, files and memory; twice is once."""
        ...


@dataclass(frozen=True)
class Contexts:
    """One row as a teacher sees it: ``text`` int64 [n], its tokens without padding and up to the last context;
    ``chunks`` int64 [k], the chunks after which it is continued; ``ends`` int64 [k], the tokens of each context."""

    text: Tokens
    chunks: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    @classmethod
    def of(cls, tokens: Tokens, asked: Continuing) -> Contexts:
        """The contexts of a row of int64 [C * K]; RefusedError where K does not divide it."""
        given = contexts(tokens, asked.chunk, asked.eos_id)
        is_eos = np.asarray(tokens).reshape(-1, asked.chunk) == asked.eos_id
        text = is_eos.cumsum(axis=1) == is_eos  # all up to the first EOS of a chunk, it included
        chunks = np.flatnonzero(given)
        ends = text.sum(axis=1).cumsum()[chunks]
        last = int(ends[-1]) if len(ends) else 0
        return cls(np.asarray(tokens, dtype=np.int64)[text.reshape(-1)][:last], chunks, ends)

    def spread(self, drawn: dict[float, npt.NDArray[np.int64]], tokens: Tokens, asked: Continuing) -> dict[float, Ids]:
        """What was drawn, whole numbers [R, k, K] by temperature, at its places in the row: int32 [C-1, R, K]."""
        found = {}
        for temperature, ids in drawn.items():
            found[temperature] = np.full((len(tokens) // asked.chunk - 1, *ids.shape[::2]), ABSENT, np.int32)
            found[temperature][self.chunks] = ids.swapaxes(0, 1)
        return found
