"""The store of teacher targets: SQLite, one row a sequence, made for exactly one teacher and one set of parameters."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from latentforge.errors import RefusedError
from latentforge.targets.row import SequenceTargets, check_targets, pack_row, unpack_row

SCHEMA = 1
DEFAULT_CACHE_BYTES = 512 << 20
_IN_A_QUERY = 500

Tokens = npt.NDArray[Any]


@dataclass(frozen=True)
class Coverage:
    """How many of the sequences that are wanted have targets."""

    present: int
    total: int

    @property
    def fraction(self) -> float:
        """Between 0 and 1; of nothing wanted, 1."""
        return self.present / self.total if self.total else 1.0

    def __str__(self) -> str:
        # Rounded down: 99.99 % must not read as complete.
        return f"{int(self.fraction * 1000) / 10:.1f} % ({self.present} of {self.total} sequences)"


class TargetStore:
    """Top-k targets by sequence, on disk.

    A row's key is sha256 of the teacher's identity, the parameters and the tokens; its value carries a checksum over
    key and content. Writing is in WAL mode, so a crash loses rows but never leaves one that reads wrong; :meth:`close`
    leaves a single file. Reading is immutable: no file is made or touched beside the store.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, *, readonly: bool, cache_bytes: int) -> None:
        self.path = path
        self.readonly = readonly
        self._connection = connection
        self._lock = threading.RLock()
        self._cache: OrderedDict[bytes, SequenceTargets] = OrderedDict()
        self._cache_limit = cache_bytes
        self._cached = 0
        meta = _read_meta(path, connection)
        self.identity: dict[str, Any] = meta["identity"]
        self.k: int = meta["k"]
        self.temperatures: tuple[float, ...] = tuple(float(t) for t in meta["temperatures"])
        self.vocab_size: int = meta["vocab_size"]
        self._id_bytes = 2 if self.vocab_size <= 1 << 16 else 4
        self._key_head = hashlib.sha256(_canonical(meta))

    @classmethod
    def create(
        cls,
        path: Path,
        identity: Mapping[str, Any],
        k: int,
        temperatures: Sequence[float],
        *,
        vocab_size: int,
    ) -> TargetStore:
        """A new, empty store open for writing; ``identity`` is the teacher's, JSON-able. Refused where one exists."""
        path = Path(path)
        if not 1 <= k <= vocab_size:
            raise RefusedError(f"k = {k} does not fit a vocabulary of {vocab_size} tokens", next="lower score.k")
        values = [float(t) for t in temperatures]
        if not values or len(set(values)) != len(values) or not all(0 < t < float("inf") for t in values):
            raise RefusedError(f"temperatures {list(temperatures)} are not distinct finite values above 0")
        if path.exists():
            raise RefusedError(f"{path} exists already")
        meta = {
            "schema": SCHEMA,
            "identity": dict(identity),
            "k": k,
            "temperatures": values,
            "vocab_size": vocab_size,
        }
        # Made whole under another name, so that a store that exists always says what it is for.
        fresh = path.with_name(path.name + ".partial")
        fresh.unlink(missing_ok=True)
        connection = sqlite3.connect(fresh)
        with connection:
            connection.execute("CREATE TABLE meta (value TEXT NOT NULL)")
            connection.execute("CREATE TABLE rows (key BLOB PRIMARY KEY, value BLOB NOT NULL, mass BLOB NOT NULL)")
            connection.execute("INSERT INTO meta VALUES (?)", (_canonical(meta).decode(),))
        connection.close()
        for journal in _journals(path):
            # Left by a store of this name that is gone: SQLite could take it for this one's.
            journal.unlink(missing_ok=True)
        os.replace(fresh, path)
        return cls.open(path, readonly=False)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        readonly: bool = True,
        identity: Mapping[str, Any] | None = None,
        k: int | None = None,
        temperatures: Sequence[float] | None = None,
        vocab_size: int | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> TargetStore:
        """Open a store; what is given of identity and parameters must be what it was made for, or it is refused."""
        path = Path(path)
        if not path.is_file():
            raise RefusedError(f"store of targets {path} does not exist", next="run the score run")
        if readonly:
            for journal in _journals(path):
                if not journal.name.endswith("-shm") and journal.exists() and journal.stat().st_size:
                    raise RefusedError(
                        f"{path} was not closed: {journal.name} holds rows that are not in it",
                        next="run the score run again; it resumes",
                    )
        options = "?mode=ro&immutable=1" if readonly else "?mode=rw"
        connection = sqlite3.connect(
            f"file:{quote(str(path.absolute()))}{options}", uri=True, check_same_thread=False, isolation_level=None
        )
        try:
            if not readonly:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=NORMAL")
            store = cls(path, connection, readonly=readonly, cache_bytes=cache_bytes)
            asked = {"identity": identity, "k": k, "temperatures": temperatures, "vocab_size": vocab_size}
            store._check_made_for({name: value for name, value in asked.items() if value is not None})
        except sqlite3.DatabaseError as error:
            connection.close()
            raise RefusedError(f"{path} is not a readable store of targets: {error}", next="score again") from None
        except BaseException:
            connection.close()
            raise
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close; after writing, everything lies in the one file and the journal files are gone."""
        with self._lock:
            if not self.readonly:
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._connection.execute("PRAGMA journal_mode=DELETE")
            self._connection.close()

    def key(self, tokens: Tokens) -> bytes:
        """The key (32 bytes) of a sequence: int tokens ``[L]``."""
        values = np.asarray(tokens)
        if values.ndim != 1 or (values.size and (values.min() < 0 or values.max() >= self.vocab_size)):
            raise RefusedError(f"tokens of shape {values.shape} are not one sequence of ids below {self.vocab_size}")
        digest = self._key_head.copy()
        digest.update(values.astype("<u4").tobytes())
        return digest.digest()

    def put_many(self, rows: Iterable[tuple[Tokens, SequenceTargets]]) -> int:
        """Write (tokens ``[L]``, targets of ``L - 1`` positions) in one transaction; returns how many are new."""
        if self.readonly:
            raise RefusedError(f"{self.path} is open for reading only")
        values = []
        for tokens, targets in rows:
            if len(targets.ids) != len(tokens) - 1:
                raise RefusedError(f"{len(targets.ids)} target rows for {len(tokens)} tokens; one less was expected")
            check_targets(targets, k=self.k, temperatures=self.temperatures, vocab_size=self.vocab_size)
            key = self.key(tokens)
            mass = np.array(list(targets.tail_mass().values()), dtype="<f8").tobytes()
            values.append((key, pack_row(key, targets, id_bytes=self._id_bytes), mass))
        with self._lock:
            before = self._connection.total_changes
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.executemany("INSERT OR IGNORE INTO rows VALUES (?, ?, ?)", values)
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
            return self._connection.total_changes - before

    def get(self, tokens: Tokens) -> SequenceTargets:
        """The targets of one sequence (tokens ``[L]``); RefusedError where they are missing or damaged."""
        return self.get_many([tokens])[0]

    def get_many(self, sequences: Sequence[Tokens] | Tokens) -> list[SequenceTargets]:
        """The targets of several sequences (each tokens ``[L]``), in their order; a missing one is refused."""
        keys = [self.key(tokens) for tokens in sequences]
        with self._lock:
            missing = [key for key in dict.fromkeys(keys) if key not in self._cache]
            read = self._read(missing)
            found = [self._cache.get(key) or read.get(key) for key in keys]
            for key in keys:
                if key in self._cache:
                    self._cache.move_to_end(key)
            self._remember(read)
        absent = [number for number, targets in enumerate(found) if targets is None]
        if absent:
            raise RefusedError(
                f"{self.path.name} has no targets for {len(absent)} of {len(keys)} sequences (the first: "
                f"{np.asarray(sequences[absent[0]])[:6].tolist()}…)",
                next="the score run must cover the data that is trained on; run it again",
            )
        return [targets for targets in found if targets is not None]

    def present(self, keys: Iterable[bytes]) -> set[bytes]:
        """Those of the keys that have a row (the row itself is not read)."""
        wanted = list(dict.fromkeys(keys))
        found: set[bytes] = set()
        with self._lock:
            for at in range(0, len(wanted), _IN_A_QUERY):
                part = wanted[at : at + _IN_A_QUERY]
                query = f"SELECT key FROM rows WHERE key IN ({','.join('?' * len(part))})"
                found.update(row[0] for row in self._query(query, part))
        return found

    def coverage(self, keys: Iterable[bytes]) -> Coverage:
        """How many of the keys have a row; equal keys count once."""
        wanted = set(keys)
        return Coverage(len(self.present(wanted)), len(wanted))

    def drop_damaged(self) -> int:
        """Read every row and delete those whose checksum is wrong, to be scored again; returns how many."""
        with self._lock:
            damaged = []
            for (number,) in self._query("SELECT rowid FROM rows ORDER BY rowid", ()):
                key, value = self._query("SELECT key, value FROM rows WHERE rowid = ?", (number,))[0]
                try:
                    unpack_row(key, value, temperatures=self.temperatures)
                except RefusedError:
                    damaged.append((number,))
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany("DELETE FROM rows WHERE rowid = ?", damaged)
            self._connection.execute("COMMIT")
        return len(damaged)

    def stats(self) -> dict[str, Any]:
        """Rows, bytes of the file and of packed rows, k, temperatures, and the mean tail mass by temperature."""
        with self._lock:
            rows, packed = self._query("SELECT count(*), coalesce(sum(length(value)), 0) FROM rows", ())[0]
            masses = [np.frombuffer(row[0], dtype="<f8") for row in self._query("SELECT mass FROM rows", ())]
        mean = np.mean(masses, axis=0) if masses else [None] * len(self.temperatures)
        return {
            "rows": int(rows),
            "bytes": self.path.stat().st_size,
            "packed_bytes": int(packed),
            "k": self.k,
            "temperatures": list(self.temperatures),
            "tail_mass": {
                f"{t:g}": None if m is None else float(m) for t, m in zip(self.temperatures, mean, strict=True)
            },
        }

    def _read(self, keys: list[bytes]) -> dict[bytes, SequenceTargets]:
        found: dict[bytes, SequenceTargets] = {}
        for at in range(0, len(keys), _IN_A_QUERY):
            part = keys[at : at + _IN_A_QUERY]
            query = f"SELECT key, value FROM rows WHERE key IN ({','.join('?' * len(part))})"
            for key, value in self._query(query, part):
                found[key] = unpack_row(key, value, temperatures=self.temperatures)
        return found

    def _remember(self, read: dict[bytes, SequenceTargets]) -> None:
        for key, targets in read.items():
            if targets.nbytes > self._cache_limit:
                continue
            self._cache[key] = targets
            self._cached += targets.nbytes
        while self._cached > self._cache_limit:
            _, dropped = self._cache.popitem(last=False)
            self._cached -= dropped.nbytes

    def _query(self, query: str, values: Sequence[Any]) -> list[Any]:
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise RefusedError(f"{self.path} is damaged: {error}", next="score again from the start") from None

    def _check_made_for(self, asked: dict[str, Any]) -> None:
        made: dict[str, Any] = {
            "identity": self.identity,
            "k": self.k,
            "temperatures": list(self.temperatures),
            "vocab_size": self.vocab_size,
        }
        if "temperatures" in asked:
            asked["temperatures"] = [float(t) for t in asked["temperatures"]]
        if "identity" in asked:
            asked["identity"] = dict(asked["identity"])
        for name, wanted in asked.items():
            if made[name] == wanted:
                continue
            have = made[name]
            if name == "identity":
                name = "teacher " + next(n for n in sorted({*have, *wanted}) if have.get(n) != wanted.get(n))
                field = name.removeprefix("teacher ")
                have, wanted = have.get(field), wanted.get(field)
            raise RefusedError(
                f"{self.path} was made for {name} {have!r}, not for {wanted!r}", next="score again with this teacher"
            )


def _journals(path: Path) -> list[Path]:
    return [path.with_name(path.name + suffix) for suffix in ("-wal", "-journal", "-shm")]


def _canonical(meta: dict[str, Any]) -> bytes:
    return json.dumps(meta, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _read_meta(path: Path, connection: sqlite3.Connection) -> dict[str, Any]:
    rows = connection.execute("SELECT value FROM meta").fetchall()
    try:
        meta = json.loads(rows[0][0])
        if meta["schema"] == SCHEMA and {"identity", "k", "temperatures", "vocab_size"} <= set(meta):
            return dict(meta)
        found = f"schema {meta['schema']!r}"
    except (IndexError, ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    raise RefusedError(f"{path} does not say what it was made for ({found}; schema {SCHEMA} is read here)")
