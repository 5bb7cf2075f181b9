"""One sequence's teacher targets, and the bytes that keep them: packed, compressed, with a checksum."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from latentforge.errors import RefusedError

_MAGIC = b"LFT1"
_HEAD = struct.Struct("<4sBxHII")  # magic, bytes an id, temperatures, positions, k
_CHECK = 16
_LEVEL = 3
_MASS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class SequenceTargets:
    """A teacher's top-k rows for one sequence of L tokens: row ``i`` predicts token ``i + 1``.

    ``ids`` int32 and ``logprobs`` float32 (natural log, T = 1, descending) have shape ``[L-1, k]``; ``tails`` maps each
    stored temperature T to float32 ``[L-1]``, the log of Σ exp(logp / T) over the tokens outside the top-k.
    """

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    tails: dict[float, npt.NDArray[np.float32]]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.ids.nbytes + self.logprobs.nbytes + sum(tail.nbytes for tail in self.tails.values())

    def tail_mass(self) -> dict[float, float]:
        """The teacher's mean probability mass outside the top-k, at each stored temperature."""
        return {t: float(np.mean(_outside(self.logprobs, tail, t))) for t, tail in self.tails.items()}


def check_targets(targets: SequenceTargets, *, k: int, temperatures: tuple[float, ...], vocab_size: int) -> None:
    """Refuse rows that cannot be what a teacher said: wrong shape, ids or order, not-a-number, mass other than 1."""
    shape = targets.ids.shape
    if len(shape) != 2 or shape[1] != k or targets.logprobs.shape != shape:
        raise RefusedError(f"targets have shapes ids {shape}, logprobs {targets.logprobs.shape}; [L-1, {k}] was asked")
    if tuple(targets.tails) != temperatures or any(tail.shape != shape[:1] for tail in targets.tails.values()):
        raise RefusedError(f"targets have tails for T = {list(targets.tails)}; {list(temperatures)} was asked")
    if shape[0] == 0:
        return
    if targets.ids.min() < 0 or targets.ids.max() >= vocab_size:
        raise RefusedError(
            f"target ids {targets.ids.min()}..{targets.ids.max()} are outside the vocabulary of {vocab_size}"
        )
    if not np.isfinite(targets.logprobs).all() or any(
        (~np.isfinite(tail) & ~np.isneginf(tail)).any() for tail in targets.tails.values()
    ):
        raise RefusedError("the teacher answered with values that are not finite", next="check the teacher's weights")
    if (np.diff(targets.logprobs, axis=1) > 0).any():
        raise RefusedError("target logprobs are not in descending order")
    if 1.0 in targets.tails:
        mass = np.exp(targets.logprobs.astype(np.float64)).sum(axis=1) + np.exp(targets.tails[1.0].astype(np.float64))
        worst = float(np.abs(mass - 1.0).max())
        if worst > _MASS_TOLERANCE:
            raise RefusedError(f"the teacher's probabilities and tail do not sum to 1 (off by {worst:.3g})")


def pack_row(key: bytes, targets: SequenceTargets, *, id_bytes: int) -> bytes:
    """The bytes of a row: head, checksum, zstd of byte planes. The checksum covers the key: a moved row is refused."""
    positions, k = targets.ids.shape
    head = _HEAD.pack(_MAGIC, id_bytes, len(targets.tails), positions, k)
    payload = _planes(targets.ids.astype(np.dtype(f"<u{id_bytes}"))) + _planes(targets.logprobs.astype("<f4"))
    for tail in targets.tails.values():
        payload += _planes(tail.astype("<f4"))
    packed = zstandard.ZstdCompressor(level=_LEVEL).compress(payload)
    return head + _checksum(key, head, packed) + packed


def unpack_row(key: bytes, value: bytes, *, temperatures: tuple[float, ...]) -> SequenceTargets:
    """Read a row back; RefusedError where a single bit is not what was written under this key."""
    head, check, packed = value[: _HEAD.size], value[_HEAD.size : _HEAD.size + _CHECK], value[_HEAD.size + _CHECK :]
    if len(check) != _CHECK or check != _checksum(key, head, packed):
        raise RefusedError(
            f"row {key.hex()[:12]}… of the store of targets is damaged (checksum)", next="score again from the start"
        )
    magic, id_bytes, n_temperatures, positions, k = _HEAD.unpack(head)
    if magic != _MAGIC or n_temperatures != len(temperatures):
        raise RefusedError(f"row {key.hex()[:12]}… is of another format ({magic!r}, {n_temperatures} temperatures)")
    cells = positions * k
    size = cells * (id_bytes + 4) + positions * 4 * n_temperatures
    payload = zstandard.ZstdDecompressor().decompress(packed, max_output_size=size)
    ids = _from_planes(payload, 0, np.dtype(f"<u{id_bytes}"), cells)
    logprobs = _from_planes(payload, cells * id_bytes, np.dtype("<f4"), cells)
    tails, at = {}, cells * (id_bytes + 4)
    for temperature in temperatures:
        tails[temperature] = _from_planes(payload, at, np.dtype("<f4"), positions)
        at += positions * 4
    return SequenceTargets(ids.astype(np.int32).reshape(positions, k), logprobs.reshape(positions, k), tails)


def _outside(logprobs: npt.NDArray[Any], tail: npt.NDArray[Any], temperature: float) -> npt.NDArray[np.float64]:
    outside = np.exp(tail.astype(np.float64))
    inside = np.exp(logprobs.astype(np.float64) / temperature).sum(axis=1)
    return np.asarray(outside / (inside + outside))


def _checksum(key: bytes, head: bytes, packed: bytes) -> bytes:
    return hashlib.blake2b(packed, digest_size=_CHECK, key=hashlib.sha256(key + head).digest()).digest()


def _planes(values: npt.NDArray[Any]) -> bytes:
    # All first bytes, then all second bytes, …: signs and exponents lie together and compress; mantissas do not.
    return values.reshape(-1).view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def _from_planes(payload: bytes, start: int, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    planes = np.frombuffer(payload, dtype=np.uint8, count=count * dtype.itemsize, offset=start)
    return np.ascontiguousarray(planes.reshape(dtype.itemsize, count).T).reshape(-1).view(dtype)
