"""The store of a teacher's continuations: SQLite, one row a sequence, R chunks drawn after each of its chunks."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.targets import continued, upkeep
from latentforge.targets.connection import Connection
from latentforge.targets.continued import ABSENT, Ids, Tokens
from latentforge.targets.description import require
from latentforge.targets.making import make
from latentforge.targets.store import Coverage, MissingError

SCHEMA = 1
_IN_A_QUERY = 500


class Continued(NamedTuple):
    """``ids`` int64 [B, C-1, R, K]: the chunks that a teacher drew after chunk c of each row, EOS behind an end of a
    text; ``given`` bool [B, C-1]: for which c there are any. Where there are none, ``ids`` are EOS."""

    ids: Tensor
    given: Tensor


@dataclass(frozen=True)
class Made:
    """What a store was made for: another value, another key."""

    identity: Mapping[str, Any]
    chunk: int
    count: int
    temperatures: tuple[float, ...]
    vocab_size: int
    eos_id: int
    seed: int

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.count < 1:
            raise RefusedError(f"count = {self.count} chunks of {self.chunk} tokens: both are at least 1")
        if self.vocab_size < 1 or not 0 <= self.eos_id < self.vocab_size:
            raise RefusedError(f"eos_id = {self.eos_id} is no token of a vocabulary of {self.vocab_size}")
        apart = len(set(self.temperatures)) == len(self.temperatures)
        if not self.temperatures or not apart or not all(0 < t < float("inf") for t in self.temperatures):
            raise RefusedError(f"temperatures {list(self.temperatures)} are not distinct finite values above 0")

    @property
    def canonical(self) -> bytes:
        """JSON whose sha256 begins every key."""
        value = {"kind": "continuations", "schema": SCHEMA, **vars(self)}
        value |= {"identity": dict(self.identity), "temperatures": list(self.temperatures)}
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def read(cls, path: Path, connection: Connection) -> Made:
        """What the store's own table says."""
        rows = connection.query("SELECT value FROM meta")
        try:
            value = json.loads(rows[0][0])
            if (value.pop("kind", None), value.pop("schema")) != ("continuations", SCHEMA):
                raise ValueError("another kind of store, or another schema")
            return cls(**{**value, "temperatures": tuple(float(t) for t in value["temperatures"])})
        except (IndexError, ValueError, KeyError, TypeError) as error:
            raise RefusedError(
                f"{path} is no store of continuations ({type(error).__name__}: {error})",
                next="run the continuations run again from the start",
            ) from None


class ContinuationStore:
    """A teacher's continuations by sequence, on disk.

    A row's key is sha256 of what the store was made for and of the tokens; its value carries a checksum over key and
    content. One process writes, any number read beside it: a reader sees whole transactions and writes nothing. A
    writer that is killed loses the transaction that it was in.
    """

    def __init__(self, path: Path, connection: Connection) -> None:
        self.path = path
        self.readonly = connection.readonly
        self._connection = connection
        self._lock = threading.RLock()
        self.made = Made.read(path, connection)
        self._key_head = hashlib.sha256(self.made.canonical)

    @classmethod
    def create(
        cls,
        path: Path,
        identity: Mapping[str, Any],
        *,
        chunk: int,
        count: int,
        temperatures: Sequence[float],
        vocab_size: int,
        eos_id: int,
        seed: int,
    ) -> ContinuationStore:
        """A new, empty store open for writing; ``identity`` is the teacher's, JSON-able. ExistsError where one is.

        ``count`` (R) chunks of ``chunk`` (K) tokens are drawn after each chunk at each of the ``temperatures``, by
        ``seed``.
        """
        given = tuple(float(t) for t in temperatures)
        made = Made(dict(identity), chunk, count, given, vocab_size, eos_id, seed)
        try:
            content = made.canonical
        except (TypeError, ValueError) as error:
            raise RefusedError(f"the teacher's identity is not JSON ({error})") from None
        make(Path(path), content, _create_tables)
        return cls.open(path, readonly=False)

    @classmethod
    def open(cls, path: Path, *, readonly: bool = True, **asked: Any) -> ContinuationStore:
        """Open a store; what is ``asked`` (``identity``, ``chunk``, ``count``, ``temperatures``, ``vocab_size``,
        ``eos_id``, ``seed``) must be what it was made for, or it is refused by name.

        Read-only, it may be open for writing in another process; nothing is written, not even a journal.
        """
        path = Path(path)
        if not path.is_file():
            raise RefusedError(f"store of continuations {path} does not exist", next="run the continuations run")
        connection = Connection(path, readonly=readonly)
        try:
            store = cls(path, connection)
            require(store.made, path, "run the continuations run again with this teacher", **asked)
            if not readonly:
                connection.prepare()
        except BaseException:
            connection.abandon()
            raise
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close; after writing, everything lies in one file and the journal is gone, unless somebody still reads."""
        with self._lock:
            self._connection.close()

    def key(self, tokens: Tokens) -> bytes:
        """The key (32 bytes) of a sequence: int tokens ``[L]``."""
        values = np.asarray(tokens)
        whole = values.dtype.kind in "iu" and values.ndim == 1 and values.size > 0
        if not whole or values.min() < 0 or values.max() >= self.made.vocab_size:
            raise RefusedError(
                f"tokens {values.dtype} {list(values.shape)} are not one sequence of ids below {self.made.vocab_size}"
            )
        digest = self._key_head.copy()
        digest.update(values.astype("<u4").tobytes())
        return digest.digest()

    def put(self, tokens: Tokens, drawn: Mapping[float, Ids]) -> bool:
        """Store the continuations of one sequence now (a transaction of its own); False where they were there.

        ``drawn`` gives int32 [C-1, R, K] for each temperature, in the store's order: -1 for contexts that are not
        continued (:func:`latentforge.targets.continued.contexts`). What follows an EOS is stored as EOS.
        """
        if self.readonly:
            raise RefusedError(f"{self.path} is open for reading only")
        made, key = self.made, self.key(tokens)
        given = continued.contexts(tokens, made.chunk, made.eos_id)
        continued.check_drawn(
            drawn,
            given,
            temperatures=made.temperatures,
            count=made.count,
            chunk=made.chunk,
            vocab_size=made.vocab_size,
        )
        ended = {t: continued.absorbed(ids, made.eos_id) for t, ids in drawn.items()}
        value = continued.pack(key, ended, given, vocab_size=made.vocab_size)
        with self._lock, self._connection.transaction() as connection:
            return connection.execute("INSERT OR IGNORE INTO rows VALUES (?, ?)", (key, value)).rowcount == 1

    def get(self, tokens: Tokens) -> dict[float, Ids]:
        """What was drawn for one sequence ``[L]``: int32 [C-1, R, K] by temperature, -1 where a context is not
        continued. MissingError without a row, RefusedError where it is damaged."""
        return self._get_many([np.asarray(tokens)])[0]

    def of(self, tokens: Tensor, temperature: float) -> Continued:
        """What was drawn at ``temperature`` for each row of ``tokens`` int64 [B, L], on their device."""
        return self.of_each(tokens, [temperature])[temperature]

    def of_each(self, tokens: Tensor, temperatures: Sequence[float]) -> dict[float, Continued]:
        """The same at several temperatures, by temperature; a row holds all of its own, and is read once."""
        for temperature in temperatures:
            if temperature not in self.made.temperatures:
                known = ", ".join(f"{t:g}" for t in self.made.temperatures)
                raise RefusedError(
                    f"{self.path.name} holds no continuations at T = {temperature:g}, but at {known}",
                    next=f"name {temperature:g} in continuations.temperatures",
                )
        if tokens.dim() != 2 or not len(tokens):
            raise RefusedError(f"tokens are {list(tokens.shape)}; [B, L] is needed")
        rows = tokens.cpu().numpy()
        given = continued.contexts(rows, self.made.chunk, self.made.eos_id)
        read, there = self._get_many(list(rows)), torch.from_numpy(given).to(tokens.device)
        found: dict[float, Continued] = {}
        for temperature in temperatures:
            ids = np.stack([row[temperature] for row in read])
            ids[~given] = self.made.eos_id
            found[temperature] = Continued(torch.from_numpy(ids.astype(np.int64)).to(tokens.device), there)
        return found

    def present(self, keys: Iterable[bytes]) -> set[bytes]:
        """Those of the keys that have a row (the row itself is not read)."""
        wanted = list(dict.fromkeys(keys))
        return {row[0] for row in self._select("SELECT key FROM rows WHERE key IN", wanted)}

    def coverage(self, keys: Iterable[bytes]) -> Coverage:
        """How many of the keys have a row; equal keys count once."""
        wanted = set(keys)
        return Coverage(len(self.present(wanted)), len(wanted))

    def check(self) -> upkeep.Health:
        """Read every row and SQLite's own structure; says what is damaged, changes nothing."""
        with self._lock:
            return upkeep.check(self._connection, self._unpack, lambda done, total: None)

    def drop_damaged(self) -> int:
        """Read every row and delete those whose checksum is wrong, to be drawn again; returns how many."""
        with self._lock:
            damaged = upkeep.damaged_rows(self._connection, self._unpack)
            with self._connection.transaction() as connection:
                connection.executemany("DELETE FROM rows WHERE rowid = ?", [(number,) for number in damaged])
        return len(damaged)

    def stats(self) -> dict[str, int]:
        """``rows``, ``bytes`` of the file, ``packed_bytes`` of the rows."""
        with self._lock:
            ((rows, packed),) = self._connection.query("SELECT count(*), coalesce(sum(length(value)), 0) FROM rows")
        return {"rows": int(rows), "bytes": self.path.stat().st_size, "packed_bytes": int(packed)}

    def _get_many(self, sequences: Sequence[Tokens]) -> list[dict[float, Ids]]:
        keys = [self.key(tokens) for tokens in sequences]
        values = dict(self._select("SELECT key, value FROM rows WHERE key IN", list(dict.fromkeys(keys))))
        absent = [number for number, key in enumerate(keys) if key not in values]
        if absent:
            raise MissingError(
                f"{self.path.name} has no continuations of {len(absent)} of {len(keys)} sequences (the first: "
                f"{sequences[absent[0]][:6].tolist()}…)",
                next="the continuations run must cover the rows that are trained on; run it again",
            )
        return [self._spread(key, values[key], tokens) for key, tokens in zip(keys, sequences, strict=True)]

    def _spread(self, key: bytes, value: bytes, tokens: Tokens) -> dict[float, Ids]:
        """A row's ids at their contexts."""
        made, found = self.made, {}
        given = continued.contexts(tokens, made.chunk, made.eos_id)
        for temperature, ids in self._unpack(key, value).items():
            if ids.shape != (int(given.sum()), made.count, made.chunk):
                raise RefusedError(f"row {key.hex()[:12]}… holds {list(ids.shape)}, not what {self.path} was made for")
            found[temperature] = np.full((len(given), made.count, made.chunk), ABSENT, np.int32)
            found[temperature][given] = ids
        return found

    def _unpack(self, key: bytes, value: bytes) -> dict[float, Ids]:
        return continued.unpack(key, value, temperatures=self.made.temperatures, vocab_size=self.made.vocab_size)

    def _select(self, sql: str, keys: list[bytes]) -> list[Any]:
        found = []
        with self._lock:
            for at in range(0, len(keys), _IN_A_QUERY):
                part = keys[at : at + _IN_A_QUERY]
                found += self._connection.query(f"{sql} ({','.join('?' * len(part))})", part)
        return found


def _create_tables(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE rows (key BLOB PRIMARY KEY, value BLOB NOT NULL)")
