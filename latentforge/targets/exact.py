"""The body of a row whose numbers are not rounded: ids as in every row, float32 in byte planes. Read in numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from latentforge.targets import candidates
from latentforge.targets.integers import join, split
from latentforge.targets.packing import Arrays, Content, Contents, Shape, Streams


class ExactLevels:
    """No rounding: what is stored comes back bit for bit."""

    def error(self, logprobs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Nothing."""
        return np.zeros(np.shape(logprobs))


EXACT = ExactLevels()


def lengths(shape: Shape) -> tuple[int, int, int, int]:
    """Bytes of each stream: numbers of entries (where they differ), ids, places, planes of float32."""
    numbers = shape.entries + shape.positions * len(shape.temperatures)
    return shape.positions * int(shape.mixed), shape.unique, shape.entries, 4 * numbers


def pack(
    ids: npt.NDArray[Any], logprobs: npt.NDArray[Any], tails: dict[float, npt.NDArray[Any]]
) -> tuple[Shape, Streams, npt.NDArray[np.uint8]]:
    """Shape, streams and packed bits of ids ``[P, k]`` (-1 = absent, at a row's end), logprobs and tails."""
    positions, k = ids.shape
    there = ids >= 0
    counts = there.sum(axis=1)
    mixed = bool((counts != k).any())
    gaps, places = candidates.listed(ids[there])
    parts = [split(stream) for stream in (counts if mixed else counts[:0], gaps, places)]
    numbers = np.concatenate([logprobs[there], *tails.values()]).astype("<f4")
    planes = np.ascontiguousarray(numbers.view(np.uint8).reshape(-1, 4).T).reshape(-1)
    shape = Shape(positions, k, len(places), len(gaps), mixed, tuple(tails))
    bits = np.packbits(np.concatenate([bits for _, bits in parts]), bitorder="little")
    return shape, [*(tokens for tokens, _ in parts), planes], bits


def unpack(shape: Shape, streams: Contents, bits: Content) -> Arrays:
    """What :func:`pack` was given; ValueError or IndexError where the body contradicts itself."""
    if tuple(len(stream) for stream in streams) != lengths(shape):
        raise ValueError("its streams are not as long as its head says")
    *tokens, left = (np.frombuffer(content, np.uint8) for content in (*streams, bits))
    counts, at = join(tokens[0], left, 0)
    gaps, at = join(tokens[1], left, at)
    places, _ = join(tokens[2], left, at)
    have = counts.astype(np.int64) if shape.mixed else np.full(shape.positions, shape.k, np.int64)
    there = np.arange(shape.k)[None, :] < have[:, None]
    numbers = np.ascontiguousarray(tokens[3].reshape(4, -1).T).reshape(-1).view("<f4").astype(np.float32)
    ids = np.full(there.shape, -1, np.int32)
    ids[there] = candidates.from_list(gaps)[places]
    logprobs = np.full(there.shape, -np.inf, np.float32)
    logprobs[there] = numbers[: shape.entries]
    return ids, logprobs, list(numbers[shape.entries :].reshape(len(shape.temperatures), shape.positions))
