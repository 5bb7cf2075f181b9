"""Digests of a model tensor by tensor: the same numbers under the same names, however a file packs them."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

_LARGEST_HEADER = 100_000_000  # the format's own bound
_BLOCK = 1 << 20


def tensor_digests(path: Path) -> dict[str, dict[str, Any]] | None:
    """The tensors of a ``.safetensors`` file by name: ``dtype``, ``shape``, ``sha256`` of the bytes (little-endian).

    None where the file is not of that format. Format: https://huggingface.co/docs/safetensors (8 bytes length, JSON
    header, data); read here in the standard library, since an operator's install has no library for it.
    """
    with open(path, "rb") as file:
        size = path.stat().st_size
        header, begin = _header(file, size)
        if header is None:
            return None
        found = {}
        for name in sorted(header):
            tensor = header[name]
            try:
                first, last = (int(offset) for offset in tensor["data_offsets"])
                dtype, shape = str(tensor["dtype"]), [int(length) for length in tensor["shape"]]
            except (KeyError, TypeError, ValueError):
                return None
            if not 0 <= first <= last <= size - begin:
                return None
            found[name] = {"dtype": dtype, "shape": shape, "sha256": _digest(file, begin + first, last - first)}
        return found


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any] | None, int]:
    """The header without its free text, and where the data begins; None where there is none."""
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
        return None, 0
    try:
        value = json.loads(file.read(length))
    except (ValueError, RecursionError):
        return None, 0
    if not isinstance(value, dict):
        return None, 0
    value.pop("__metadata__", None)
    return value, 8 + length


def _digest(file: BinaryIO, begin: int, length: int) -> str:
    file.seek(begin)
    digest = hashlib.sha256()
    while length:
        block = file.read(min(length, _BLOCK))
        if not block:
            break
        digest.update(block)
        length -= len(block)
    return digest.hexdigest()
