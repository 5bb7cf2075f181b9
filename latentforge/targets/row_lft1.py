"""Rows as they were stored before LFT2: whole float32 in byte planes. They are read, and written no more."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

MAGIC = b"LFT1"
_HEAD = struct.Struct("<4sBxHII")  # magic, bytes an id, temperatures, positions, k
_CHECK = 16

Parts = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], list[npt.NDArray[np.float32]]]


def unpack(key: bytes, value: bytes) -> Parts | None:
    """ids ``[L-1, k]``, logprobs ``[L-1, k]`` and a tail ``[L-1]`` for each temperature; None where it is damaged."""
    head, check, packed = value[: _HEAD.size], value[_HEAD.size : _HEAD.size + _CHECK], value[_HEAD.size + _CHECK :]
    secret = hashlib.sha256(key + head).digest()
    if len(check) != _CHECK or check != hashlib.blake2b(packed, digest_size=_CHECK, key=secret).digest():
        return None
    _, id_bytes, temperatures, positions, k = _HEAD.unpack(head)
    cells = positions * k
    size = cells * (id_bytes + 4) + positions * 4 * temperatures
    payload = zstandard.ZstdDecompressor().decompress(packed, max_output_size=size)
    ids = _from_planes(payload, 0, np.dtype(f"<u{id_bytes}"), cells)
    logprobs = _from_planes(payload, cells * id_bytes, np.dtype("<f4"), cells)
    begin = cells * (id_bytes + 4)
    tails = [_from_planes(payload, begin + 4 * positions * n, np.dtype("<f4"), positions) for n in range(temperatures)]
    return ids.astype(np.int32).reshape(positions, k), logprobs.reshape(positions, k), tails


def _from_planes(payload: bytes, start: int, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    planes = np.frombuffer(payload, dtype=np.uint8, count=count * dtype.itemsize, offset=start)
    return np.ascontiguousarray(planes.reshape(dtype.itemsize, count).T).reshape(-1).view(dtype)
