"""Digests of a model tensor by tensor: the same numbers under the same names, however a file packs them."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any, BinaryIO

from latentforge.spec.reading import parse_json

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
        spans = {name: _span(tensor, size - begin) for name, tensor in header.items()}
        if None in spans.values() or not _is_text(header):
            return None
        # Tensors do not overlap: what one small header names is read once, and not a thousand times.
        if sum(last - first for first, last in filter(None, spans.values())) > size - begin:
            return None
        found = {}
        for name, span in sorted(spans.items()):
            first, last = span or (0, 0)
            tensor = header[name]
            sha256 = _digest(file, begin + first, last - first)
            found[name] = {"dtype": tensor["dtype"], "shape": tensor["shape"], "sha256": sha256}
        return found


def _span(tensor: Any, size: int) -> tuple[int, int] | None:
    """Where a tensor lies in ``size`` bytes of data; None where its entry is not one of the format."""
    if not isinstance(tensor, dict) or set(tensor) != {"dtype", "shape", "data_offsets"}:
        return None
    offsets, shape = tensor["data_offsets"], tensor["shape"]
    if not isinstance(tensor["dtype"], str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        return None
    return (offsets[0], offsets[1]) if offsets[0] <= offsets[1] <= size else None


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _is_text(header: dict[str, Any]) -> bool:
    """Whether every name and type can be written as UTF-8 (JSON can name half of a character)."""
    try:
        "".join([*header, *(tensor["dtype"] for tensor in header.values())]).encode()
    except UnicodeEncodeError:
        return False
    return True


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any] | None, int]:
    """The header without its free text, and where the data begins; None where there is none."""
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
        return None, 0
    try:
        value = parse_json(file.read(length))
    except ValueError:
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
