"""A teacher of another tokenizer behind the face of one that has the student's; the data as that teacher reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from latentforge.data.shards import PackedShard, ShardSet
from latentforge.errors import RefusedError
from latentforge.kernels.targets import TopKTargets
from latentforge.targets.row import SequenceTargets
from latentforge.teachers.crossing import ABSENT, Bridge, Crossing
from latentforge.teachers.protocol import Capability, Limits, Scorer, TeacherIdentity, Tokens
from latentforge.teachers.store import scored_batch

_SHORTEST = 2
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CrossCoverage:
    """Of ``positions`` predictions of the student, how many can carry a teacher's row, and where the others are.

    ``single`` lie in spans of one token on each side, ``several`` in spans that the teacher writes with several tokens;
    ``split`` in spans of several student tokens; the rest is not crossed: cut characters, changed bytes, row ends.
    ``longest`` and ``shortest`` are the teacher's tokens of a sequence.
    """

    positions: int
    single: int
    several: int
    split: int
    longest: int
    shortest: int

    @property
    def share(self) -> float:
        """The share of positions that can carry KD, 0 to 1."""
        return (self.single + self.several) / self.positions if self.positions else 0.0

    def __str__(self) -> str:
        def part(count: int) -> str:
            return f"{int(1000 * count / max(1, self.positions)) / 10:.1f} %"

        rest = self.positions - self.single - self.several - self.split
        return (
            f"{part(self.single + self.several)} of {self.positions} student positions carry KD ({part(self.single)} "
            f"one token on each side, {part(self.several)} several of the teacher's), {part(self.split)} lie in spans "
            f"of several student tokens, {part(rest)} are not crossed"
        )


def survey(
    bridge: Bridge, data: ShardSet, *, temperature: float = 1.0, progress: Progress = lambda done, total: None
) -> CrossCoverage:
    """Cross every row of the data; what it says of KD holds wherever the teacher's rows name the tokens of a path."""
    total = len(data.train) + len(data.heldout)
    counts = np.zeros(3, dtype=np.int64)
    longest, shortest, done = 0, 1 << 62, 0
    for shard in (data.train, data.heldout):
        for at in range(len(shard)):
            crossing = bridge.cross(shard.rows([at])[0])
            counts += positions_of(crossing, temperature)
            length = len(crossing.teacher)
            longest = max(longest, length)
            shortest = min(shortest, length) if length >= _SHORTEST else shortest
            done += 1
            if done % 256 == 0 or done == total:
                progress(done, total)
    if longest < _SHORTEST:
        raise RefusedError(
            "no row of the data can be read by the teacher's tokenizer", next="use the teacher's tokenizer"
        )
    single, several, split = counts.tolist()
    return CrossCoverage(total * (data.sequence_length - 1), single, several, split, longest, shortest)


def positions_of(crossing: Crossing, temperature: float) -> npt.NDArray[np.int64]:
    """How many student positions carry in single spans, in several, and lie in spans of several student tokens."""
    one, many = crossing.carried()
    inside = crossing.spans.student
    wide = inside[inside[:, 1] - inside[:, 0] > 1]
    # The first token of a sequence is given, not predicted.
    split = int((wide[:, 1] - np.maximum(wide[:, 0], 1)).clip(min=0).sum())
    return np.array([len(one), len(many) if temperature == 1.0 else 0, split], dtype=np.int64)


def require_coverage(found: CrossCoverage, wanted: float) -> None:
    """Refuse where fewer positions than the share ``wanted`` carry KD, with the figure."""
    if found.share < wanted:
        lower = int(found.share * 100) / 100
        raise RefusedError(
            f"cross-tokenizer coverage {found.share:.4f} is below distill.min_coverage = {wanted:g}: {found}",
            next=f"use a tokenizer nearer to the teacher's, or set distill.min_coverage = {lower:g}",
        )


@dataclass(frozen=True)
class CrossedShard:
    """The rows of a packed shard as the teacher's tokens; a row that the teacher cannot read is left out."""

    shard: PackedShard
    bridge: Bridge

    def __len__(self) -> int:
        return len(self.shard)

    def rows(self, indices: npt.ArrayLike) -> list[Tokens]:
        """The teacher's tokens, int64 ``[n]`` each, of the rows of ``indices`` (int ``[b]``), in their order."""
        crossed = (self.bridge.cross(row).teacher for row in self.shard.rows(indices))
        return [tokens for tokens in crossed if len(tokens) >= _SHORTEST]


@dataclass(frozen=True)
class CrossedShards:
    """The data of a student as its teacher reads it: what scoring asks of a :class:`ShardSet`.

    ``sequence_length`` is that of the longest sequence, ``shortest`` that of the shortest.
    """

    train: CrossedShard
    heldout: CrossedShard
    sequence_length: int
    shortest: int

    @classmethod
    def of(cls, data: ShardSet, bridge: Bridge, found: CrossCoverage) -> CrossedShards:
        """Both shards of ``data``, of which ``found`` was surveyed."""
        shards = CrossedShard(data.train, bridge), CrossedShard(data.heldout, bridge)
        return cls(*shards, found.longest, found.shortest)


class CrossedTeacher:
    """Answers in the student's tokens from ``teacher``, which is asked in its own.

    Rows that do not carry KD say so: all entries absent, tail 0, no loss and no gradient. Refused where ``coverage`` is
    below ``least``.
    """

    def __init__(
        self, teacher: Scorer, bridge: Bridge, *, coverage: CrossCoverage | None = None, least: float = 0.0
    ) -> None:
        if coverage is not None:
            require_coverage(coverage, least)
        self.teacher = teacher
        self.bridge = bridge
        self.coverage = coverage
        self.least = least

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Scores: dense logits over the teacher's tokens are none over the student's."""
        return frozenset({"score"})

    @property
    def identity(self) -> TeacherIdentity:
        """The teacher's."""
        return self.teacher.identity

    @property
    def vocab_size(self) -> int:
        """The student's tokens."""
        return self.bridge.student.vocab_size

    @property
    def notes(self) -> tuple[str, ...]:
        """The teacher's, the bridge's, and the coverage where it was surveyed."""
        said = () if self.coverage is None else (f"cross-tokenizer coverage: {self.coverage}",)
        return (*self.teacher.notes, *self.bridge.notes, *said)

    @property
    def limits(self) -> Limits:
        """The teacher's entries and temperatures; the length of a sequence is counted in its own tokens."""
        inner = self.teacher.limits
        return Limits(inner.max_k, None, inner.temperatures)

    def metrics(self) -> dict[str, Any]:
        """The teacher's, where it counts."""
        counted = getattr(self.teacher, "metrics", None)
        return {} if counted is None else dict(counted())

    def score(
        self, sequences: Sequence[Tokens], *, k: int, temperatures: tuple[float, ...]
    ) -> Iterator[tuple[int, SequenceTargets]]:
        """Targets of each student sequence, as the teacher answers; one temperature at a time."""
        if len(temperatures) != 1:
            raise RefusedError(
                f"targets across tokenizers are mapped for one temperature, not for {list(temperatures)}"
            )
        temperature = temperatures[0]
        crossings = [self.bridge.cross(np.asarray(tokens)) for tokens in sequences]
        readable = [number for number, one in enumerate(crossings) if len(one.teacher) >= _SHORTEST]
        for number in sorted(set(range(len(crossings))) - set(readable)):
            yield number, silent_rows(len(sequences[number]) - 1, k, temperature)
        # Neighbours of one length are one forward pass of a teacher in this process.
        readable.sort(key=lambda number: len(crossings[number].teacher))
        asked = [crossings[number].teacher for number in readable]
        for at, rows in self.teacher.score(asked, k=k, temperatures=temperatures) if asked else ():
            number = readable[at]
            found = self.bridge.map_rows(
                crossings[number], rows, length=len(sequences[number]), temperature=temperature
            )
            yield number, SequenceTargets(found.ids, found.logprobs, {temperature: found.tail})

    def targets(self, tokens: Tensor, *, temperature: float, k: int | None = None) -> TopKTargets:
        """Top-k rows of ``tokens`` int64 ``[B, L]``, on their device; ``k`` must be given."""
        if k is None:
            raise RefusedError("a teacher of another tokenizer has no dense logits over the student's tokens")
        return scored_batch(self, tokens, temperature=temperature, k=k)

    def close(self) -> None:
        """Close the teacher."""
        self.teacher.close()


def silent_rows(rows: int, k: int, temperature: float) -> SequenceTargets:
    """Rows in which the teacher says nothing: every entry absent, the whole mass outside."""
    return SequenceTargets(
        np.full((rows, k), ABSENT, dtype=np.int32),
        np.full((rows, k), -np.inf, dtype=np.float32),
        {temperature: np.zeros(rows, dtype=np.float32)},
    )
