"""The ledger: one line a run, each holding the digest of the line before; appended, never changed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from latentforge.errors import FailedError, RefusedError
from latentforge.spec.identity import RUN_ID, check_run_id
from latentforge.spec.reading import parse_json, read_regular

LEDGER = "ledger.jsonl"
FIRST = "0" * 64
"""``prev`` of the first line."""

_LARGEST = 1 << 29  # a line has 310 bytes: more than a million runs

_QUOTED = json.JSONEncoder(ensure_ascii=False).encode
_FIELDS = {"entry", "prev", "run", "manifest", "wall", "sha256"}


@dataclass(frozen=True)
class Entry:
    """One line: ``entry`` counts from 1, ``manifest`` is the sha256 of the run's manifest, ``wall`` UTC (ISO 8601)."""

    entry: int
    prev: str
    run: str
    manifest: str
    wall: str

    @property
    def line(self) -> bytes:
        """The line's bytes with its end; it also holds its own digest, so that the last line is covered too."""
        bare = self._text(None)
        # Half a character has no place in UTF-8: such a line equals none that was ever written.
        digest = hashlib.sha256(bare.encode(errors="replace")).hexdigest()
        return (self._text(digest) + "\n").encode(errors="replace")

    def _text(self, sha256: str | None) -> str:
        # What canonical_bytes writes, which for whole numbers and text is what the standard library writes in this
        # order: a ledger is read whole before each line that is added to it.
        own = "" if sha256 is None else f',"sha256":{_QUOTED(sha256)}'
        return (
            f'{{"entry":{self.entry:d},"manifest":{_QUOTED(self.manifest)},"prev":{_QUOTED(self.prev)},'
            f'"run":{_QUOTED(self.run)}{own},"wall":{_QUOTED(self.wall)}}}'
        )


@dataclass(frozen=True)
class Chain:
    """A ledger that was read and found whole: its entries, and the digest that the next line must hold."""

    entries: tuple[Entry, ...]
    head: str

    def of_run(self, run: str) -> Entry | None:
        """The entry of a run, or None."""
        return self._by_run.get(run)

    def digest(self, entry: int) -> str:
        """The sha256 of the line of an entry (from 1), with its line end."""
        return self.entries[entry].prev if entry < len(self.entries) else self.head

    @cached_property
    def _by_run(self) -> dict[str, Entry]:
        return {entry.run: entry for entry in self.entries}


def read_chain(path: Path) -> Chain:
    """Read a ledger and check every line and link; FailedError names the first line that is wrong.

    RefusedError where there is none, or it is no file that can be read.
    """
    try:
        content = read_regular(path, largest=_LARGEST)
    except FileNotFoundError:
        raise RefusedError(f"there is no ledger at {path}") from None
    return check_chain(content, path.name)


def check_chain(content: bytes, name: str = LEDGER) -> Chain:
    """The chain that a ledger's bytes hold; FailedError names the first line that is wrong, and how."""
    entries: list[Entry] = []
    runs: set[str] = set()
    head = FIRST
    lines = content.split(b"\n")
    if lines.pop() != b"":
        raise FailedError(f"{name} line {len(lines) + 1} has no line end: it is torn or was altered")
    for number, bare in enumerate(lines, 1):
        entry = _entry(bare, f"{name} line {number}")
        line = bare + b"\n"
        if entry.line != line:
            raise FailedError(f"{name} line {number} does not hash to its own digest: it was altered")
        if entry.prev != head:
            raise FailedError(
                f"{name} line {number} links to {entry.prev[:12]}…, the line before is {head[:12]}…: "
                "a line was altered, removed or moved"
            )
        if entry.entry != number:
            raise FailedError(f"{name} line {number} is numbered {entry.entry}")
        if entry.run in runs:
            raise FailedError(f"{name} line {number} enters {entry.run} a second time")
        runs.add(entry.run)
        entries.append(entry)
        head = hashlib.sha256(line).hexdigest()
    return Chain(tuple(entries), head)


def append(path: Path, run: str, manifest: str, *, wall: str | None = None) -> Entry:
    """Append a run's line under a lock, durably; RefusedError where the run is entered already.

    The whole chain is checked first: nothing is built on a ledger that was altered.
    """
    check_run_id(run)
    with _locked(path) as file:
        content = _all(file)
        chain = check_chain(content, path.name)
        if (earlier := chain.of_run(run)) is not None:
            raise RefusedError(f"{run} is already in {path} (entry {earlier.entry}): evidence is written once")
        wall = wall or datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        entry = Entry(len(chain.entries) + 1, chain.head, run, manifest, wall)
        try:
            written = os.write(file, entry.line)
            if written != len(entry.line):
                raise OSError(f"only {written} of {len(entry.line)} bytes were written")
            os.fsync(file)
        except OSError as error:
            # A line that is not whole was never acknowledged; leave the ledger as it was found.
            os.ftruncate(file, len(content))
            raise FailedError(f"{path} could not be appended to: {error}", next="free disk space") from error
    return entry


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    except OSError as error:
        raise RefusedError(f"{path} cannot be written to: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise RefusedError(f"{path} is no regular file")
        fcntl.flock(file, fcntl.LOCK_EX)
        if new:
            sync_folder(path.parent)
        yield file
    finally:
        os.close(file)  # releases the lock


def _all(file: int) -> bytes:
    os.lseek(file, 0, os.SEEK_SET)
    blocks = []
    while block := os.read(file, 1 << 20):
        blocks.append(block)
    return b"".join(blocks)


def sync_folder(folder: Path) -> None:
    """Make a new name in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(line: bytes, where: str) -> Entry:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise FailedError(f"{where} is not JSON: it was altered ({error})") from None
    if not isinstance(value, Mapping) or set(value) != _FIELDS:
        raise FailedError(f"{where} does not have the fields of a ledger line: it was altered")
    entry, texts = value["entry"], {name: value[name] for name in ("prev", "run", "manifest", "wall")}
    if not isinstance(entry, int) or isinstance(entry, bool) or not all(isinstance(t, str) for t in texts.values()):
        raise FailedError(f"{where} holds values of the wrong kind: it was altered")
    if not RUN_ID.fullmatch(texts["run"]):
        raise FailedError(f"{where} names the run {texts['run']!r}, which is none: it was altered")
    return Entry(entry, **texts)
