"""What keeps a store in bounds and in order: limits of age and size, checks of every row, statistics."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from latentforge.errors import RefusedError
from latentforge.targets.connection import Connection, journals
from latentforge.targets.description import Description
from latentforge.targets.levels import GradedLevels
from latentforge.targets.row import GRADED

LEAST_BYTES = 65_536
_MOST_BYTES = 2**63 - 1
_EVICT_AT_ONCE = 64
_ROW_OVERHEAD = 160  # key, its index, mass and time: bytes a row beside its value, generously
_SLACK_PAGES = 8

Row = tuple[bytes, bytes, float, bytes]
"""key, tail mass by temperature, when it was stored (seconds since 1970), value."""

Unpack = Callable[[bytes, bytes], Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Policy:
    """How long a row lives, how large the file may get, how log-probabilities are rounded; all outside the keys."""

    ttl_seconds: float | None
    max_bytes: int | None
    levels: GradedLevels
    stored: str = "stored"
    """The SQL that gives when a row was stored; schema 1 did not say."""

    @classmethod
    def checked(cls, ttl_seconds: float | None, max_bytes: int | None, levels: GradedLevels) -> Policy:
        """Refuse limits that no store can keep."""
        if ttl_seconds is not None and not 0 < ttl_seconds < math.inf:
            raise RefusedError(f"ttl_seconds = {ttl_seconds} is not a finite number above 0")
        if max_bytes is not None and max_bytes < LEAST_BYTES:
            raise RefusedError(f"max_bytes = {max_bytes} is below the least of {LEAST_BYTES}")
        if max_bytes is not None and max_bytes > _MOST_BYTES:
            raise RefusedError(f"max_bytes = {max_bytes} is above the most of {_MOST_BYTES} that a file can have")
        return cls(ttl_seconds, max_bytes, levels)

    @classmethod
    def read(cls, connection: Connection, description: Description) -> Policy:
        """The limits that a store keeps."""
        if description.schema == 1:
            return cls(None, None, GRADED, stored="0")
        rows = connection.query("SELECT ttl_seconds, max_bytes, finest, coarsest FROM limits")
        if len(rows) != 1:
            raise RefusedError(f"{connection.path} is damaged: it has {len(rows)} sets of limits")
        ttl_seconds, max_bytes, finest, coarsest = rows[0]
        try:
            return cls.checked(ttl_seconds, max_bytes, GradedLevels(finest, coarsest))
        except TypeError:
            raise RefusedError(f"{connection.path} is damaged: its limits are {rows[0]}") from None

    def changed(self, connection: sqlite3.Connection, *, ttl_seconds: float | None, max_bytes: int | None) -> Policy:
        """The policy with the limits that are given, written down."""
        new = Policy.checked(
            self.ttl_seconds if ttl_seconds is None else ttl_seconds,
            self.max_bytes if max_bytes is None else max_bytes,
            self.levels,
        )
        connection.execute("UPDATE limits SET ttl_seconds = ?, max_bytes = ?", (new.ttl_seconds, new.max_bytes))
        return replace(new, stored=self.stored)

    def oldest(self, now: float) -> float:
        """Rows that were stored at this time or before are not there any more."""
        return -math.inf if self.ttl_seconds is None else now - self.ttl_seconds


@dataclass(frozen=True)
class Pruned:
    """How many rows went because they were too ``old``, and how many to make room (``evicted``)."""

    old: int
    evicted: int


@dataclass(frozen=True)
class Health:
    """``rows`` were read, ``damaged`` are the keys (hex) of those that are not what was written; ``structure`` is what
    SQLite says of its file, None where it has nothing to say."""

    rows: int
    damaged: tuple[str, ...]
    structure: str | None

    @property
    def good(self) -> bool:
        """Every row reads right and the file is whole."""
        return not self.damaged and self.structure is None


def create_tables(connection: sqlite3.Connection, policy: Policy) -> None:
    """The tables of an empty store."""
    connection.execute("CREATE TABLE limits (ttl_seconds REAL, max_bytes INTEGER, finest REAL, coarsest REAL)")
    connection.execute(
        "INSERT INTO limits VALUES (?, ?, ?, ?)",
        (policy.ttl_seconds, policy.max_bytes, policy.levels.finest, policy.levels.coarsest),
    )
    # The value stands last: what is asked of all rows is read without it.
    connection.execute("CREATE TABLE rows (key BLOB PRIMARY KEY, mass BLOB NOT NULL, stored REAL, value BLOB NOT NULL)")
    # Apart, so that noting a use rewrites no row.
    connection.execute("CREATE TABLE uses (number INTEGER PRIMARY KEY, used INTEGER NOT NULL)")
    connection.execute("CREATE INDEX uses_by_age ON uses (used)")


def insert(connection: sqlite3.Connection, rows: Sequence[Row], policy: Policy, *, now: float) -> int:
    """Put rows whose key is not there (or too old); first, where the size is bound, make room. How many are new."""
    fresh = []
    for row in rows:
        found = connection.execute("SELECT rowid, stored FROM rows WHERE key = ?", (row[0],)).fetchone()
        if found is not None and found[1] > policy.oldest(now):
            continue
        if found is not None:
            delete(connection, [found[0]])
        fresh.append(row)
    if policy.max_bytes is not None and fresh:
        page = _pragma(connection, "page_size")
        need = sum(-(-(len(row[3]) + _ROW_OVERHEAD) // (page - 4)) + 1 for row in fresh) + _SLACK_PAGES
        _make_room(connection, policy, need * page, now=now)
    numbers = [connection.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", row).lastrowid for row in fresh]
    if policy.max_bytes is not None:
        _stamp(connection, numbers)
        if _bytes_used(connection) > policy.max_bytes:
            raise _too_small(policy, sum(len(row[3]) for row in fresh))
    return len(fresh)


def note_uses(connection: sqlite3.Connection, keys: Sequence[bytes]) -> None:
    """Remember that rows were used, in the order of the keys; those that are gone are left out."""
    numbers = [connection.execute("SELECT rowid FROM rows WHERE key = ?", (key,)).fetchone() for key in keys]
    _stamp(connection, [found[0] for found in numbers if found is not None])


def prune(connection: sqlite3.Connection, policy: Policy, *, now: float) -> Pruned:
    """Delete what is too old, then what was used longest ago until the rest fits."""
    old = [row[0] for row in connection.execute("SELECT rowid FROM rows WHERE stored <= ?", (policy.oldest(now),))]
    delete(connection, old)
    return Pruned(len(old), 0 if policy.max_bytes is None else _make_room(connection, policy, 0, now=now))


def delete(connection: sqlite3.Connection, numbers: Sequence[int]) -> None:
    """Delete rows by their number."""
    connection.executemany("DELETE FROM uses WHERE number = ?", [(number,) for number in numbers])
    connection.executemany("DELETE FROM rows WHERE rowid = ?", [(number,) for number in numbers])


def check(connection: Connection, unpack: Unpack, progress: Progress) -> Health:
    """Read every row, and let SQLite look at its pages."""
    numbers = connection.query("SELECT rowid FROM rows ORDER BY rowid")
    damaged = []
    for done, (number,) in enumerate(numbers, start=1):
        for key, value in connection.query("SELECT key, value FROM rows WHERE rowid = ?", (number,)):
            if not _reads(unpack, key, value):
                damaged.append(bytes(key).hex())
        progress(done, len(numbers))
    said = [row[0] for row in connection.query("PRAGMA integrity_check(5)")]
    return Health(len(numbers), tuple(damaged), None if said == ["ok"] else "; ".join(said))


def damaged_rows(connection: Connection, unpack: Unpack) -> list[int]:
    """The numbers of rows that are not what was written."""
    damaged = []
    for (number,) in connection.query("SELECT rowid FROM rows ORDER BY rowid"):
        ((key, value),) = connection.query("SELECT key, value FROM rows WHERE rowid = ?", (number,))
        if not _reads(unpack, key, value):
            damaged.append(number)
    return damaged


def statistics(
    connection: Connection, path: Path, description: Description, policy: Policy, *, now: float
) -> dict[str, Any]:
    """What ``latentforge targets stats`` prints, but for the tail mass."""
    oldest = policy.oldest(now)
    rows, packed, first, last = connection.query(
        f"SELECT count(*), coalesce(sum(length(value)), 0), min({policy.stored}), max({policy.stored}) FROM rows "
        f"WHERE {policy.stored} > ?",
        (oldest,),
    )[0]
    old = connection.query(f"SELECT count(*) FROM rows WHERE {policy.stored} <= ?", (oldest,))[0][0]
    wal = journals(path)[0]
    return {
        "schema": description.schema,
        "rows": int(rows),
        "too_old": int(old),
        "bytes": path.stat().st_size,
        "journal_bytes": wal.stat().st_size if wal.exists() else 0,
        "packed_bytes": int(packed),
        "identity": dict(description.identity),
        "mode": description.mode,
        "k": description.k,
        "draws": description.draws,
        "seed": description.seed,
        "temperatures": list(description.temperatures),
        "vocab_size": description.vocab_size,
        "ttl_seconds": policy.ttl_seconds,
        "max_bytes": policy.max_bytes,
        "rounding": description.rounding,
        "steps_nats": [policy.levels.finest, policy.levels.coarsest] if description.rounding == "fine" else None,
        "stored": None if description.schema == 1 or not rows else [first, last],
    }


def tail_mass(connection: Connection, temperatures: Sequence[float]) -> dict[str, float | None]:
    """The mean mass outside the entries over all rows, by temperature."""
    masses = [np.frombuffer(row[0], dtype="<f8") for row in connection.query("SELECT mass FROM rows")]
    masses = [mass for mass in masses if not np.isnan(mass).any()]  # of one token: no positions
    mean = np.mean(masses, axis=0) if masses else [None] * len(temperatures)
    return {f"{t:g}": None if m is None else float(m) for t, m in zip(temperatures, mean, strict=True)}


def _make_room(connection: sqlite3.Connection, policy: Policy, need: int, *, now: float) -> int:
    """Delete rows until ``need`` bytes more fit: first those that are too old, then those used longest ago."""
    assert policy.max_bytes is not None
    if _bytes_used(connection) + need <= policy.max_bytes:
        return 0
    if policy.ttl_seconds is not None:
        old = connection.execute("SELECT rowid FROM rows WHERE stored <= ?", (policy.oldest(now),)).fetchall()
        delete(connection, [number for (number,) in old])
    evicted = 0
    while _bytes_used(connection) + need > policy.max_bytes:
        rows = connection.execute(
            "SELECT rows.rowid, length(value) FROM rows LEFT JOIN uses ON uses.number = rows.rowid "
            "ORDER BY coalesce(used, 0), rows.rowid LIMIT ?",
            (_EVICT_AT_ONCE,),
        ).fetchall()
        if not rows:
            raise _too_small(policy, need)
        over = _bytes_used(connection) + need - policy.max_bytes
        going = []
        for number, size in rows:
            if over <= 0:
                break
            going.append(number)
            over -= size
        delete(connection, going)
        evicted += len(going)
    return evicted


def _too_small(policy: Policy, need: int) -> RefusedError:
    return RefusedError(
        f"max_bytes = {policy.max_bytes}: {need} bytes of rows that are stored together do not fit",
        next="latentforge targets prune STORE --max-bytes N, with a larger N",
    )


def _stamp(connection: sqlite3.Connection, numbers: Sequence[int | None]) -> None:
    last = connection.execute("SELECT coalesce(max(used), 0) FROM uses").fetchone()[0]
    connection.executemany(
        "INSERT OR REPLACE INTO uses VALUES (?, ?)", [(n, last + 1 + place) for place, n in enumerate(numbers)]
    )


def _bytes_used(connection: sqlite3.Connection) -> int:
    pages = _pragma(connection, "page_count") - _pragma(connection, "freelist_count")
    return pages * _pragma(connection, "page_size")


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def _reads(unpack: Unpack, key: bytes, value: bytes) -> bool:
    try:
        unpack(key, value)
    except RefusedError:
        return False
    return True
