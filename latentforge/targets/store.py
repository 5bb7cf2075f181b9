"""The store of teacher targets: SQLite, one row a sequence, made for exactly one teacher and one set of parameters."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from latentforge.errors import RefusedError
from latentforge.targets import upkeep
from latentforge.targets.connection import Connection
from latentforge.targets.description import SCHEMA, Description, Rounding
from latentforge.targets.exact import EXACT, ExactLevels
from latentforge.targets.levels import CountLevels, GradedLevels, Levels
from latentforge.targets.making import make
from latentforge.targets.native import name as reader_name
from latentforge.targets.native import reader
from latentforge.targets.row import GRADED, SequenceTargets, check_targets, pack_row, unpack_row

DEFAULT_CACHE_BYTES = 512 << 20
_IN_A_QUERY = 500
_UNPACKED, _KEPT = 8, 31 << 20
"""Rows in memory are up to so many times as large as packed; glibc learns from pieces of at most 32 MiB."""

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


class MissingError(RefusedError):
    """A sequence has no row in a store, or none that is young enough."""


class TargetStore:
    """A teacher's targets by sequence, on disk.

    A row's key is sha256 of the teacher's identity, the parameters and the tokens; its value carries a checksum over
    key and content. One process writes, any number read beside it: a reader sees whole transactions and writes nothing,
    not even a journal. A writer that is killed loses the transaction that it was in. Rows older than ``ttl_seconds``
    are not there for those who ask; where ``max_bytes`` is set, the rows that were used longest ago make room.
    """

    def __init__(
        self, path: Path, connection: Connection, *, cache_bytes: int, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = path
        self.readonly = connection.readonly
        self._connection = connection
        self._clock = clock
        self._lock = threading.RLock()
        # key -> (targets, when they were stored): a row may get too old while it lies here.
        self._cache: OrderedDict[bytes, tuple[SequenceTargets, float]] = OrderedDict()
        self._cache_limit = cache_bytes
        self._cached = 0
        self._used: dict[bytes, None] = {}
        self.description = Description.read(path, connection)
        self.identity: dict[str, Any] = dict(self.description.identity)
        self.k = self.description.k
        self.temperatures = self.description.temperatures
        self.vocab_size = self.description.vocab_size
        self.mode = self.description.mode
        self.draws = self.description.draws
        self.seed = self.description.seed
        self.rounding = self.description.rounding
        self.policy = upkeep.Policy.read(connection, self.description)
        self._key_head = hashlib.sha256(self.description.canonical)
        self._unpack = reader()

    @classmethod
    def create(
        cls,
        path: Path,
        identity: Mapping[str, Any],
        k: int,
        temperatures: Sequence[float],
        *,
        vocab_size: int,
        mode: Literal["topk", "sample"] = "topk",
        draws: int | None = None,
        seed: int | None = None,
        ttl_seconds: float | None = None,
        max_bytes: int | None = None,
        levels: GradedLevels = GRADED,
        rounding: Rounding = "fine",
        clock: Callable[[], float] = time.time,
    ) -> TargetStore:
        """A new, empty store open for writing; ``identity`` is the teacher's, JSON-able. ExistsError where one is.

        ``mode="sample"`` keeps tokens drawn from the teacher (``draws`` a position, by ``seed``) instead of the k
        likeliest. ``levels`` says how log-probabilities are rounded; it is no part of a row's key.
        ``rounding="none"``, which is, keeps logprobs and tails as the float32 that are given.
        """
        path = Path(path)
        description = Description.checked(
            identity=identity,
            k=k,
            temperatures=temperatures,
            vocab_size=vocab_size,
            mode=mode,
            draws=draws,
            seed=seed,
            rounding=rounding,
        )
        policy = upkeep.Policy.checked(ttl_seconds, max_bytes, levels)
        make(path, description.canonical, partial(upkeep.create_tables, policy=policy))
        return cls.open(path, readonly=False, clock=clock)

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
        mode: Literal["topk", "sample"] | None = None,
        draws: int | None = None,
        seed: int | None = None,
        rounding: Rounding | None = None,
        instead: str = "score again with this teacher",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> TargetStore:
        """Open a store; what is given of identity and parameters must be what it was made for, or it is refused, and
        ``instead`` is what to do.

        Read-only, it may be open for writing in another process; nothing is written, not even a journal.
        """
        path = Path(path)
        if not path.is_file():
            raise RefusedError(f"store of targets {path} does not exist", next="run the score run")
        connection = Connection(path, readonly=readonly)
        try:
            store = cls(path, connection, cache_bytes=cache_bytes, clock=clock)
            store.description.require(
                path,
                instead,
                identity=identity,
                k=k,
                temperatures=temperatures,
                vocab_size=vocab_size,
                mode=mode,
                draws=draws,
                seed=seed,
                rounding=rounding,
            )
            if not readonly and store.description.schema != SCHEMA:
                raise RefusedError(
                    f"{path} was written by an earlier version (schema {store.description.schema}): it is read, and "
                    "written no more",
                    next="score into a new store",
                )
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
            try:
                if self._used and not self.readonly:
                    with self._connection.transaction() as connection:
                        self._note_uses(connection)
            finally:
                self._connection.close()

    @property
    def reader(self) -> str:
        """What rows are unpacked with: ``native`` or ``numpy``."""
        unrounded = self.rounding == "none" or self.description.schema == 1
        return "numpy" if unrounded else reader_name()

    @property
    def levels(self) -> Levels | ExactLevels:
        """How log-probabilities are rounded when they are stored."""
        if self.rounding == "none":
            return EXACT
        return CountLevels(self.draws) if self.draws is not None else self.policy.levels

    def key(self, tokens: Tokens) -> bytes:
        """The key (32 bytes) of a sequence: int tokens ``[L]``."""
        values = np.asarray(tokens)
        if values.size and values.dtype.kind not in "iu":
            raise RefusedError(f"tokens are {values.dtype}, not whole numbers")
        if values.ndim != 1 or (values.size and (values.min() < 0 or values.max() >= self.vocab_size)):
            raise RefusedError(f"tokens of shape {values.shape} are not one sequence of ids below {self.vocab_size}")
        digest = self._key_head.copy()
        digest.update(values.astype("<u4").tobytes())
        return digest.digest()

    def keys(self, sequences: Sequence[Tokens] | Tokens) -> list[bytes]:
        """The keys of several sequences (each tokens ``[L]``); those of an array ``[B, L]`` are looked at together."""
        if not isinstance(sequences, np.ndarray) or sequences.ndim != 2 or not sequences.size:
            return [self.key(tokens) for tokens in sequences]
        if sequences.min() < 0 or sequences.max() >= self.vocab_size:
            raise RefusedError(f"tokens of shape {sequences.shape} are not sequences of ids below {self.vocab_size}")
        content, found = np.ascontiguousarray(sequences, "<u4"), []
        for row in content:
            digest = self._key_head.copy()
            digest.update(row)
            found.append(digest.digest())
        return found

    def put(self, tokens: Tokens, targets: SequenceTargets) -> bool:
        """Store one row now (a transaction of its own); False where it was there."""
        return self.put_many([(tokens, targets)]) == 1

    def put_many(self, rows: Iterable[tuple[Tokens, SequenceTargets]]) -> int:
        """Write (tokens ``[L]``, targets of ``L - 1`` positions) in one transaction; returns how many are new."""
        if self.readonly:
            raise RefusedError(f"{self.path} is open for reading only")
        now = self._clock()
        values = {}
        for tokens, targets in rows:
            if len(targets.ids) != len(tokens) - 1:
                raise RefusedError(f"{len(targets.ids)} target rows for {len(tokens)} tokens; one less was expected")
            check_targets(targets, k=self.k, temperatures=self.temperatures, vocab_size=self.vocab_size)
            if self.draws is not None:
                if any(not np.isneginf(tail).all() for tail in targets.tails.values()):
                    raise RefusedError("a row of drawn tokens has a tail: nothing lies outside its draws")
                CountLevels(self.draws).quantise(targets.logprobs, targets.ids >= 0)
            key = self.key(tokens)
            mass = np.array(list(targets.tail_mass().values()), dtype="<f8").tobytes()
            values[key] = (key, mass, now, pack_row(key, targets, levels=self.levels))
        with self._lock, self._connection.transaction() as connection:
            # Another process may have pruned, and given the store other limits, since it was opened.
            self.policy = upkeep.Policy.read(self._connection, self.description)
            self._note_uses(connection)
            return upkeep.insert(connection, list(values.values()), self.policy, now=now)

    def get(self, tokens: Tokens) -> SequenceTargets:
        """The targets of one sequence (tokens ``[L]``); MissingError without, RefusedError where damaged."""
        return self.get_many([tokens])[0]

    def get_many(self, sequences: Sequence[Tokens] | Tokens) -> list[SequenceTargets]:
        """The targets of several sequences (each tokens ``[L]``), in their order; MissingError without one."""
        keys = self.keys(sequences)
        oldest = self.policy.oldest(self._clock())
        with self._lock:
            found: dict[bytes, SequenceTargets] = {}
            for key in keys:
                if key in self._cache and self._cache[key][1] > oldest:
                    self._cache.move_to_end(key)
                    found[key] = self._cache[key][0]
            read = self._read([key for key in dict.fromkeys(keys) if key not in found], oldest)
            found.update((key, targets) for key, (targets, _) in read.items())
            self._remember(read)
            self._use(key for key in keys if key in found)
        absent = [number for number, key in enumerate(keys) if key not in found]
        if absent:
            raise MissingError(
                f"{self.path.name} has no targets for {len(absent)} of {len(keys)} sequences (the first: "
                f"{np.asarray(sequences[absent[0]])[:6].tolist()}…)",
                next="the score run must cover the data that is trained on; run it again",
            )
        return [found[key] for key in keys]

    def present(self, keys: Iterable[bytes]) -> set[bytes]:
        """Those of the keys that have a row (the row itself is not read)."""
        wanted = list(dict.fromkeys(keys))
        found: set[bytes] = set()
        oldest = self.policy.oldest(self._clock())
        with self._lock:
            for at in range(0, len(wanted), _IN_A_QUERY):
                part = wanted[at : at + _IN_A_QUERY]
                sql = f"SELECT key FROM rows WHERE key IN ({','.join('?' * len(part))}) AND {self.policy.stored} > ?"
                found.update(row[0] for row in self._connection.query(sql, [*part, oldest]))
            self._use(key for key in wanted if key in found)
        return found

    def coverage(self, keys: Iterable[bytes]) -> Coverage:
        """How many of the keys have a row; equal keys count once."""
        wanted = set(keys)
        return Coverage(len(self.present(wanted)), len(wanted))

    def check(self, progress: Callable[[int, int], None] = lambda done, total: None) -> upkeep.Health:
        """Read every row and SQLite's own structure; says what is damaged, changes nothing."""
        with self._lock:
            return upkeep.check(self._connection, self._unpack_row, progress)

    def drop_damaged(self) -> int:
        """Read every row and delete those whose checksum is wrong, to be scored again; returns how many."""
        with self._lock:
            damaged = upkeep.damaged_rows(self._connection, self._unpack_row)
            with self._connection.transaction() as connection:
                upkeep.delete(connection, damaged)
        return len(damaged)

    def prune(
        self, *, ttl_seconds: float | None = None, max_bytes: int | None = None, compact: bool = True
    ) -> upkeep.Pruned:
        """Delete rows that are too old, then those used longest ago until the store fits; give the space back.

        A limit that is given is kept by the store from now on.
        """
        with self._lock:
            with self._connection.transaction() as connection:
                self._note_uses(connection)
                self.policy = self.policy.changed(connection, ttl_seconds=ttl_seconds, max_bytes=max_bytes)
                pruned = upkeep.prune(connection, self.policy, now=self._clock())
            self._cache.clear()
            self._cached = 0
            if compact:
                self._connection.vacuum()
        return pruned

    def stats(self) -> dict[str, Any]:
        """Rows, bytes of the file and of packed rows, parameters, limits, and the mean tail mass by temperature."""
        with self._lock:
            return {
                **upkeep.statistics(self._connection, self.path, self.description, self.policy, now=self._clock()),
                "tail_mass": upkeep.tail_mass(self._connection, self.temperatures),
                "reader": self.reader,
            }

    def _read(self, keys: list[bytes], oldest: float) -> dict[bytes, tuple[SequenceTargets, float]]:
        found: dict[bytes, tuple[SequenceTargets, float]] = {}
        for at in range(0, len(keys), _IN_A_QUERY):
            part = keys[at : at + _IN_A_QUERY]
            marks = ",".join("?" * len(part))
            sql = f"SELECT key, {self.policy.stored}, value FROM rows WHERE key IN ({marks})"
            rows = self._connection.query(sql, part)
            # glibc gives a heap back that is freed in small pieces, and takes it anew page by page, a third of the time
            # of reading; once it has seen a piece of this size come and go, it keeps as much.
            np.empty(min(_UNPACKED * sum(len(value) for _, _, value in rows), _KEPT), np.uint8)
            for key, stored, value in rows:
                if not isinstance(stored, int | float):
                    raise RefusedError(f"{self.path} is damaged: a row was stored at {stored!r}")
                if stored > oldest:
                    found[key] = self._unpack_row(key, value), stored
        return found

    def _unpack_row(self, key: bytes, value: bytes) -> SequenceTargets:
        return unpack_row(key, value, temperatures=self.temperatures, reader=self._unpack)

    def _remember(self, read: dict[bytes, tuple[SequenceTargets, float]]) -> None:
        for key, (targets, stored) in read.items():
            if targets.nbytes > self._cache_limit:
                continue
            if key in self._cache:
                self._cached -= self._cache.pop(key)[0].nbytes
            self._cache[key] = targets, stored
            self._cached += targets.nbytes
        while self._cached > self._cache_limit:
            _, (dropped, _) = self._cache.popitem(last=False)
            self._cached -= dropped.nbytes

    def _use(self, keys: Iterable[bytes]) -> None:
        # A reader writes nothing, so only what the writer itself asks for counts as used.
        if not self.readonly and self.policy.max_bytes is not None:
            for key in keys:
                self._used.pop(key, None)
                self._used[key] = None

    def _note_uses(self, connection: sqlite3.Connection) -> None:
        upkeep.note_uses(connection, list(self._used))
        self._used.clear()


def describe(path: Path) -> dict[str, Any]:
    """What a store was made for, without opening it for anything else: the object in its ``meta``."""
    with TargetStore.open(path) as store:
        return dict(json.loads(store.description.canonical))
