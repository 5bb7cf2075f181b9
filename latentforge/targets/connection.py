"""How the store's file is opened: by one who writes, and by readers who write nothing, not even a journal."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from latentforge.errors import BusyError, FailedError, LatentForgeError, RefusedError

_BUSY_SECONDS = 30.0
_LOOKS = 20
_BETWEEN_LOOKS = 0.02
"""A journal that is seen so many times, so many seconds apart, with nobody who holds it, was left by one who died; a
writer that just passes by is seen once. Counted, not timed: this process may itself stand still between two looks."""
_TICK = 0.02
"""Two changes of a file within so many seconds may bear the same time."""
_CHECKPOINT_BYTES = 16 << 20
_PASSING = ("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PROTOCOL")
_HELD = ("SQLITE_BUSY", "SQLITE_LOCKED")
_WRITE_ERRORS = frozenset({"SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_FSYNC", "SQLITE_IOERR_TRUNCATE",
                           "SQLITE_IOERR_SHMSIZE", "SQLITE_IOERR_SHMOPEN"})  # fmt: skip


def journals(path: Path) -> list[Path]:
    """The files that SQLite may put beside a store."""
    return [path.with_name(path.name + suffix) for suffix in ("-wal", "-journal", "-shm")]


class Connection:
    """A connection for writing, or one that only looks.

    A reader takes SQLite's shared locks, so it sees whole transactions while another process writes, and it maps the
    index of the journal read-only: it changes no byte beside the store. A file that was last used with a journal, and
    has none beside it, is read as immutable (SQLite would make an empty journal), until one appears or it changes.
    """

    def __init__(self, path: Path, *, readonly: bool) -> None:
        self.path = path
        self.readonly = readonly
        self._seen: tuple[int, int] | None = None
        self._connection = self._connect()

    def prepare(self) -> None:
        """Before the first write: a journal that readers can read beside (the file's header changes)."""
        began = time.monotonic()
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.DatabaseError as error:
                # While another writer opens or closes, SQLite does not wait for the change of a header.
                if _code(error) not in _HELD or time.monotonic() - began > _BUSY_SECONDS:
                    raise told(error, self.path) from None
            time.sleep(_BETWEEN_LOOKS)
        try:
            self._connection.execute("PRAGMA synchronous=NORMAL")
            size = self._connection.execute("PRAGMA page_size").fetchone()[0]
            self._connection.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_BYTES // size}")
        except sqlite3.DatabaseError as error:
            raise told(error, self.path) from None

    def abandon(self) -> None:
        """Close without another word: the store was refused."""
        self._connection.close()

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """All rows of a SELECT; RefusedError where the file is damaged."""
        if self._changed():
            self._reconnect()
        began, left_over = time.monotonic(), 0
        while True:
            try:
                found = self._connection.execute(sql, values).fetchall()
                if not self._changed():
                    return found
            except UnicodeDecodeError as error:
                if not self._changed():
                    raise RefusedError(f"{self.path} is damaged: {error}", next="score again from the start") from None
            except sqlite3.DatabaseError as error:
                # A writer is just opening, closing or taking a journal in: its index is not there yet, or not any more,
                # or the file changed while it was read without locks.
                passing = self.readonly and (_code(error).startswith(_PASSING) or self._changed())
                # SQLite looked at the locks: nobody who lives wrote that journal.
                left_over = left_over + 1 if _code(error) == "SQLITE_READONLY_ROLLBACK" else 0
                if passing and left_over == _LOOKS:
                    raise self._left_over(journals(self.path)[1]) from None
                if not passing or time.monotonic() - began > _BUSY_SECONDS:
                    raise told(error, self.path) from None
            time.sleep(_BETWEEN_LOOKS)
            self._reconnect()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction for writing: whole, or not at all."""
        if self.readonly:
            raise RefusedError(f"{self.path} is open for reading only")
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # A full disk may have ended the transaction already.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.DatabaseError as error:
            raise told(error, self.path) from None

    def vacuum(self) -> None:
        """Give the space of deleted rows back to the disk."""
        try:
            self._connection.execute("VACUUM")
        except sqlite3.DatabaseError as error:
            raise told(error, self.path) from None

    def close(self) -> None:
        """Close; after writing, everything lies in the one file, unless somebody still reads: then a journal stays."""
        try:
            if not self.readonly:
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._connection.execute("PRAGMA journal_mode=DELETE")
        except sqlite3.DatabaseError as error:
            if _code(error) not in _HELD:
                raise told(error, self.path) from None
        finally:
            self._connection.close()

    def _changed(self) -> bool:
        """Whether a file that is read as immutable is not at rest any more; locks would not tell."""
        if self._seen is None:
            return False
        wal, journal, _ = journals(self.path)
        return self._seen != _state(self.path) or _size(wal) > 0 or _size(journal) > 0

    def _reconnect(self) -> None:
        self._connection.close()
        self._connection = self._connect()

    def _connect(self) -> sqlite3.Connection:
        self._seen = None
        if self.readonly:
            # Taken before the look, so that whatever happens after it is seen.
            state = self._state_that_tells()
            self._seen = state if self._at_rest() else None
        options = "mode=rw"
        if self.readonly:
            options = "mode=ro&immutable=1" if self._seen is not None else "mode=ro&readonly_shm=1"
        try:
            connection = sqlite3.connect(
                f"file:{quote(str(self.path.absolute()))}?{options}",
                uri=True,
                check_same_thread=False,
                isolation_level=None,
                timeout=_BUSY_SECONDS,
            )
        except sqlite3.DatabaseError as error:
            raise told(error, self.path) from None
        return connection

    def _state_that_tells(self) -> tuple[int, int]:
        """The file's state, taken when another change would show in it."""
        changed, _ = _state(self.path)
        if 0 <= time.time_ns() - changed < _TICK * 1e9:
            time.sleep(_TICK)
        return _state(self.path)

    def _at_rest(self) -> bool:
        """A journal is expected by the file's header and holds nothing, and nobody has it open for writing."""
        wal, journal, shm = journals(self.path)
        for _ in range(_LOOKS):
            # Whether a journal of the other kind is a living writer's is for SQLite to say, by the locks.
            if _size(journal) or (wal.exists() and shm.exists()):
                return False
            if not _size(wal):
                break
            time.sleep(_BETWEEN_LOOKS)
        else:
            raise self._left_over(wal)
        # Only now that nobody writes: closing a file drops every lock that this process has on it.
        with self.path.open("rb") as stream:
            return stream.read(20)[18:20] == b"\x02\x02"

    def _left_over(self, journal: Path) -> RefusedError:
        return RefusedError(
            f"{self.path} was not closed: {journal.name} holds what is not in it",
            next=f"take it in, or back:  latentforge targets prune {self.path}",
        )


def told(error: sqlite3.DatabaseError, path: Path) -> LatentForgeError:
    """What SQLite reported, as the error that a user can act on."""
    code = _code(error)
    if code in _WRITE_ERRORS:
        try:
            left = os.statvfs(path.parent)
            room = f"; {left.f_bavail * left.f_frsize / 1e6:.1f} MB are free there"
        except OSError:
            room = ""
        return FailedError(
            f"{path} cannot grow: no space on its disk, or above this process's limit of file sizes ({error}{room}). "
            "The rows that were being stored are not; everything stored before is",
            next="make room and run the same again: only what is missing is asked",
        )
    if code in _HELD:
        return BusyError(f"{path} is being written by another process ({error})", next="the same again when it is done")
    if code.startswith((*_PASSING, "SQLITE_PERM")):
        return RefusedError(f"{path} cannot be opened: {error}", next=f"look at the rights of {path.parent}")
    return RefusedError(f"{path} is damaged: {error}", next="score again from the start")


def _code(error: sqlite3.DatabaseError) -> str:
    return str(getattr(error, "sqlite_errorname", "") or "")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size
