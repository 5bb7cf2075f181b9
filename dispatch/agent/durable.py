"""Writes that are whole or absent after a crash: temporary, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    """Write every byte to `fd`, or raise OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def temporary_beside(path: Path) -> Path:
    """A fresh name in the folder of `path`, which readers ignore."""
    return path.with_name(f".tmp-{path.name}-{os.getpid()}-{os.urandom(4).hex()}")


def write_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` by `data`; after a crash the old or the new content is there, never a part."""
    temporary = temporary_beside(path)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def write_json(path: Path, document: Any) -> bytes:
    """Replace `path` by the JSON of `document` (sorted keys, one line); returns the bytes."""
    data = json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    write_file(path, data)
    return data


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None when it is missing or does not parse to an object."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def append_line(path: Path, document: dict[str, Any]) -> None:
    """Append one JSON line in one write and flush it; what a full disk tore before it takes no line with it."""
    data = json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        write_all(fd, b"\n" + data if torn else data)
        os.fsync(fd)
    finally:
        os.close(fd)
