"""The order in which packed rows are trained on: a pure function of seed and step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from latentforge.errors import RefusedError

_MASK = (1 << 64) - 1


class BatchOrder:
    """Batches of row indices, epoch after epoch, each epoch a permutation of all rows.

    Nothing is remembered between calls but a cache: resuming needs only the step. The permutations come from integer
    arithmetic written here, so their bits are the same under every version of numpy.
    """

    def __init__(self, n_sequences: int, batch_size: int, seed: int) -> None:
        if n_sequences < 1 or batch_size < 1 or seed < 0:
            raise RefusedError(
                f"no batches of {batch_size} rows from {n_sequences} sequences with seed {seed}: "
                "both counts must be at least 1, the seed at least 0"
            )
        self.n_sequences = n_sequences
        self.batch_size = batch_size
        self.seed = seed
        self._cache: dict[int, npt.NDArray[np.int64]] = {}

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """Row indices, int64 ``[batch_size]``, of the batch of ``step`` (from 0)."""
        if step < 0:
            raise RefusedError(f"step {step} is negative")
        out = np.empty(self.batch_size, dtype=np.int64)
        filled = 0
        while filled < self.batch_size:
            epoch, at = divmod(step * self.batch_size + filled, self.n_sequences)
            take = min(self.batch_size - filled, self.n_sequences - at)
            out[filled : filled + take] = self.permutation(epoch)[at : at + take]
            filled += take
        return out

    def visits(self, step: int) -> npt.NDArray[np.int64]:
        """How often each row of the batch of ``step`` was in a batch before, int64 ``[batch_size]``."""
        return (step * self.batch_size + np.arange(self.batch_size)) // self.n_sequences

    def epoch(self, step: int) -> float:
        """How many times all rows have been seen before ``step``."""
        return step * self.batch_size / self.n_sequences

    def permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        """The order of all rows in an epoch, int64 ``[n_sequences]``."""
        if epoch not in self._cache:
            for old in [known for known in self._cache if abs(known - epoch) > 1]:
                del self._cache[old]
            self._cache[epoch] = _permutation(self.n_sequences, self.seed, epoch)
        return self._cache[epoch]


def _permutation(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    key = _mix_one((_mix_one(seed) + epoch) & _MASK)
    counters = np.arange(1, n + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        values = _mix(np.uint64(key) + counters * np.uint64(0x9E3779B97F4A7C15))
    return np.argsort(values, kind="stable").astype(np.int64)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), elementwise modulo 2^64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix_one(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
