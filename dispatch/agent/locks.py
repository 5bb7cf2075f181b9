"""Kernel locks that die with their last holder: one for each run, one for the device."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

# A reader tests a lock by taking it shared for an instant; whoever wants it exclusively outlasts such a test.
PATIENCE = 0.5
_PAUSE = 0.005


def held(path: Path) -> bool:
    """Whether some process holds the lock in `path`; a missing file is not held."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return True
        raise
    finally:
        os.close(fd)
    return False


def take(path: Path, *, patience: float = PATIENCE) -> int | None:
    """A descriptor that holds the lock in `path` exclusively; None when another process keeps it beyond `patience`.

    The lock belongs to the open file, so a child that inherits the descriptor keeps it after this process has died.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(fd)
                raise
            if time.monotonic() >= deadline:
                os.close(fd)
                return None
            time.sleep(_PAUSE)
            continue
        if _still_named(fd, path):
            return fd
        # The run was removed, and perhaps made anew, between open and lock: this lock guards nothing.
        os.close(fd)
        if not path.parent.is_dir():
            return None
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _still_named(fd: int, path: Path) -> bool:
    try:
        named, opened = os.stat(path), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def wait_for(path: Path, seconds: float) -> int | None:
    """Like `take`, for short critical sections: wait up to `seconds`."""
    return take(path, patience=seconds)


def release(fd: int) -> None:
    """Give this process's hold back (an heir's hold stays)."""
    os.close(fd)


def note_holder(fd: int, details: dict[str, Any]) -> None:
    """Write who holds a lock into its own file, for people; a full disk does not matter here."""
    data = json.dumps(details, sort_keys=True).encode() + b"\n"
    try:
        os.pwrite(fd, data.ljust(512), 0)
        os.ftruncate(fd, max(512, len(data)))
    except OSError:
        pass


def holder(path: Path) -> dict[str, Any] | None:
    """Who holds the lock in `path`: None when nobody does, an empty object when the holder left no readable note."""
    if not held(path):
        return None
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
