"""What a measured step is fed with: rows of tokens and a store of a teacher's rows, real files of made-up values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentforge.data.shards import PackedShard, pack
from latentforge.targets.row import SequenceTargets
from latentforge.targets.store import TargetStore

_ZIPF = 1.1
_SEED = 20_26


@dataclass(frozen=True)
class Material:
    """``rows`` packed rows and the store with targets for each of them."""

    shard: PackedShard
    store: Path


def make_material(folder: Path, *, rows: int, length: int, vocab_size: int, k: int) -> Material:
    """Write ``rows`` rows of ``length`` tokens and a store of ``k`` entries a position at T = 1.

    Tokens follow Zipf's law and log-probabilities fall as a power of the rank, so that packed rows are about as large
    as a teacher's; what they say does not change how long a step takes.
    """
    generator = np.random.default_rng(_SEED)
    ranks = np.arange(1, vocab_size + 1, dtype=np.float64) ** -_ZIPF
    cumulative = np.cumsum(ranks / ranks.sum())
    drawn = np.searchsorted(cumulative, generator.random((rows, length))).clip(max=vocab_size - 1)
    tokens = drawn.astype(np.uint32)
    path = folder / "train.bin"
    packed = pack(
        ((4 * length, row) for row in tokens), path, vocab_size=vocab_size, sequence_length=length, limit=rows
    )
    store = folder / "targets.sqlite"
    with TargetStore.create(store, {"model": "made up"}, k, (1.0,), vocab_size=vocab_size) as writing:
        for at in range(0, rows, 16):
            writing.put_many(
                [(row, _targets(generator, length - 1, k, cumulative)) for row in tokens[at : at + 16].astype(np.int64)]
            )
    return Material(PackedShard(path, packed.rows, length, np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")), store)


def _targets(
    generator: np.random.Generator, positions: int, k: int, cumulative: np.ndarray[tuple[int], np.dtype[np.float64]]
) -> SequenceTargets:
    """Rows of ``k`` different tokens whose probabilities fall with their rank, and the mass that is left."""
    vocab_size = len(cumulative)
    ids = np.empty((positions, k), dtype=np.int32)
    for position in range(positions):
        found = np.unique(np.searchsorted(cumulative, generator.random(4 * k)).clip(max=vocab_size - 1))
        while len(found) < k:
            found = np.unique(np.concatenate([found, generator.integers(0, vocab_size, k)]))
        ids[position] = generator.permutation(found)[:k]
    steepness = generator.uniform(0.8, 2.0, (positions, 1))
    weights = np.arange(1, k + 1, dtype=np.float64)[None, :] ** -steepness
    outside = generator.uniform(0.02, 0.2, (positions, 1)) if k < vocab_size else np.zeros((positions, 1))
    probabilities = weights / weights.sum(1, keepdims=True) * (1.0 - outside)
    with np.errstate(divide="ignore"):
        tail = np.log(outside[:, 0]).astype(np.float32)
    return SequenceTargets(ids, np.log(probabilities).astype(np.float32), {1.0: tail})
