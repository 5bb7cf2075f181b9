"""How a new store's file comes to be: whole or not at all, and by one process though several begin it at once."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from latentforge.errors import RefusedError
from latentforge.targets.connection import journals, told

PAGE_BYTES = 1024
"""A row takes whole pages beyond its first; of larger ones the last would stand half empty."""


class ExistsError(RefusedError):
    """A store is there already, perhaps since another process made it a moment ago."""


def make(path: Path, description: bytes, create_tables: Callable[[sqlite3.Connection], None]) -> None:
    """Write an empty store to ``path``; ExistsError where there is one, FailedError where it has no room.

    ``description`` (JSON) is what it says of itself in its table ``meta``; ``create_tables`` makes the others.
    """
    with _alone_in(path.parent):
        if path.exists():
            raise ExistsError(f"{path} exists already")
        # Made whole under another name, so that a store that exists always says what it is for.
        fresh = path.with_name(path.name + ".partial")
        fresh.unlink(missing_ok=True)
        try:
            connection = sqlite3.connect(fresh)
            connection.execute(f"PRAGMA page_size={PAGE_BYTES}")
            with connection:
                connection.execute("CREATE TABLE meta (value TEXT NOT NULL)")
                connection.execute("INSERT INTO meta VALUES (?)", (description.decode(),))
                create_tables(connection)
            connection.close()
        except sqlite3.DatabaseError as error:
            fresh.unlink(missing_ok=True)
            raise told(error, path) from None
        for journal in journals(path):
            # Left by a store of this name that is gone: SQLite could take it for this one's.
            journal.unlink(missing_ok=True)
        os.replace(fresh, path)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """While others make a store in the folder, wait. The lock is the folder's own: no file of it stays behind."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
