"""Fixed-size records that can still be written when the disk is full, and read as absent unless every bit is right."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

SIZE = 4096
MAGIC = b"LFREC01\n"
_HEAD = struct.Struct("<8sI32s")
CAPACITY = SIZE - _HEAD.size


def encode(document: dict[str, Any]) -> bytes:
    """The 4096 bytes of a record: magic, length, sha256 of length and JSON, JSON, zeros; ValueError if too long."""
    # Not escaped to ASCII: a reason in another script must not grow sixfold beyond what fits.
    body = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    if len(body) > CAPACITY:
        raise ValueError(f"a record holds {CAPACITY} bytes, this one has {len(body)}")
    length = struct.pack("<I", len(body))
    return (_HEAD.pack(MAGIC, len(body), hashlib.sha256(length + body).digest()) + body).ljust(SIZE, b"\0")


def decode(data: bytes) -> dict[str, Any] | None:
    """The document of a record; None for anything torn, flipped, short, long or never written."""
    if len(data) != SIZE:
        return None
    magic, size, digest = _HEAD.unpack_from(data)
    if magic != MAGIC or size > CAPACITY:
        return None
    body = data[_HEAD.size : _HEAD.size + size]
    if hashlib.sha256(struct.pack("<I", size) + body).digest() != digest or any(data[_HEAD.size + size :]):
        return None
    try:
        document = json.loads(body)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def preallocate(path: Path) -> None:
    """Claim the blocks of a record now, so that writing it later needs no space; an existing file is left alone."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    try:
        # Real zeros, not only fallocate: an unwritten extent may still need a metadata block to be converted.
        os.pwrite(fd, bytes(SIZE), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def write(path: Path, document: dict[str, Any], *, sync: bool = True) -> None:
    """Write a record in place over its preallocated blocks."""
    data = encode(document)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        written = os.pwrite(fd, data, 0)
        if written != SIZE:
            raise OSError(f"{path}: {written} of {SIZE} bytes written")
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def read(path: Path) -> dict[str, Any] | None:
    """The document in `path`; None when there is no valid record."""
    try:
        with open(path, "rb") as file:
            return decode(file.read(SIZE + 1))
    except OSError:
        return None
