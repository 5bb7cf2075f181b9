"""The body of a stored row: ids, levels and tails as streams of tokens and one string of bits, and back.

Four streams: *scalars* (how many entries each position has, where they differ; the level of each position's first
entry; its tails), *gaps* (the list of the sequence's ids), *places* (each entry's place in the list) and *falls* (how
many levels each entry lies below the one before it). The bits follow in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from latentforge.targets import candidates
from latentforge.targets.integers import join, split
from latentforge.targets.levels import Levels, quantise_tail, tail_of

STREAMS = 4


@dataclass(frozen=True)
class Shape:
    """What a reader must know of a body: ``entries`` ids of ``unique`` different ones at ``positions``, k at most each.

    ``mixed`` says that positions have different numbers of entries.
    """

    positions: int
    k: int
    entries: int
    unique: int
    mixed: bool
    temperatures: tuple[float, ...]

    @property
    def lengths(self) -> tuple[int, int, int, int]:
        """Tokens of each stream (of the falls: at most, where the row is mixed)."""
        scalars = self.positions * (1 + int(self.mixed) + len(self.temperatures))
        return (
            scalars,
            self.unique,
            self.entries,
            self.entries - (0 if self.mixed else min(self.entries, self.positions)),
        )


Streams = list[npt.NDArray[np.uint8]]
Content = bytes | memoryview
Contents = Sequence[Content]
Reader = Callable[["Shape", Contents, Content, Levels], "Arrays"]
Arrays = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], list[npt.NDArray[np.float32]]]


def pack(
    ids: npt.NDArray[Any], logprobs: npt.NDArray[Any], tails: dict[float, npt.NDArray[Any]], levels: Levels
) -> tuple[Shape, Streams, npt.NDArray[np.uint8]]:
    """Shape, token streams and packed bits of ids ``[P, k]`` (-1 = absent, at a row's end), logprobs and tails."""
    positions, k = ids.shape
    there = ids >= 0
    counts = there.sum(axis=1)
    mixed = bool((counts != k).any())
    firsts, level = levels.quantise(logprobs, there)
    falls = np.diff(level, axis=1)[there[:, 1:]]
    gaps, places = candidates.listed(ids[there])
    scalars = np.concatenate(
        [*([counts] if mixed else []), firsts, *(quantise_tail(tail, t) for t, tail in tails.items())]
    )
    parts = [split(stream) for stream in (scalars, gaps, places, falls)]
    shape = Shape(positions, k, len(places), len(gaps), mixed, tuple(tails))
    bits = np.packbits(np.concatenate([bits for _, bits in parts]), bitorder="little")
    return shape, [tokens for tokens, _ in parts], bits


def unpack(shape: Shape, streams: Contents, bits: Content, levels: Levels) -> Arrays:
    """The definition of what a body says, in numpy; ``native.unpack`` is the same in C++."""
    *tokens, left = (np.frombuffer(content, np.uint8) for content in (*streams, bits))
    scalars, at = join(tokens[0], left, 0)
    gaps, at = join(tokens[1], left, at)
    places, at = join(tokens[2], left, at)
    falls, at = join(tokens[3], left, at)
    table = scalars.reshape(1 + int(shape.mixed) + len(shape.temperatures), shape.positions)
    counts = table[0].astype(np.int64) if shape.mixed else np.full(shape.positions, shape.k, np.int64)
    firsts = table[int(shape.mixed)].astype(np.int64)
    there = np.arange(shape.k)[None, :] < counts[:, None]
    steps = np.zeros((shape.positions, shape.k), np.int64)
    steps[there & (np.arange(shape.k) > 0)] = falls
    if levels.first_step == 0:
        steps[:, 0] = firsts
    ids = np.full(there.shape, -1, np.int32)
    ids[there] = candidates.from_list(gaps)[places]
    logprobs = levels.logprobs_of(firsts, np.where(there, np.cumsum(steps, axis=1), 0))
    logprobs[~there] = -np.inf
    first_tail = 1 + int(shape.mixed)
    tails = [tail_of(table[first_tail + n], t) for n, t in enumerate(shape.temperatures)]
    return ids, logprobs, tails
