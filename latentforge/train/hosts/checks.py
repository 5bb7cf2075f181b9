"""Executable checks of what two hosts of a run promise each other: over a pair of sockets, in folders of their own."""

from __future__ import annotations

import hashlib
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentforge.contracts.finding import Finding
from latentforge.errors import FailedError
from latentforge.spec.hosts import following
from latentforge.spec.identity import RunIdentity
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.train.hosts import mirror
from latentforge.train.hosts.mirror import Mirror, lend, read_by
from latentforge.train.hosts.wire import HostLost, Link

DEADLINE = 1.5
_LATE = 4.0


class _Mute(Link):
    """A host that is there and does not beat."""

    def _beat(self) -> None:
        """Nothing is told."""


class _Patient(Link):
    """One whose silence is nobody's concern: what is told is read, the time that passes is not."""

    def _exactly(self, size: int) -> bytes:
        self._connection.settimeout(None)
        return super()._exactly(size)


@contextmanager
def _ends(here: type[Link], there: type[Link], deadline: float) -> Iterator[tuple[Link, Link]]:
    ours, theirs = socket.socketpair()
    links = here("b", ours, deadline), there("a", theirs, deadline)
    try:
        yield links
    finally:
        closing = [threading.Thread(target=link.close) for link in links]  # each waits for the other
        for one in closing:
            one.start()
        for one in closing:
            one.join()


def silence_is_noticed(*, mutant: str | None = None) -> Finding:
    """A host that beats is not lost, one that does not is, within the deadline. ``mutant`` "unread" reads no clock."""
    with _ends(Link, Link, DEADLINE) as (here, there):
        time.sleep(2 * DEADLINE)
        beating = not here.is_lost and not there.is_lost
    with _ends(_Patient if mutant == "unread" else Link, _Mute, DEADLINE) as (here, _):
        began = time.monotonic()
        while not here.is_lost and time.monotonic() - began < DEADLINE + _LATE:
            time.sleep(0.01)
        waited, lost = time.monotonic() - began, here.is_lost
    told = f"lost {waited:.1f} s after its last word" if lost else f"not missed in {waited:.1f} s"
    text = f"a host that beats {'kept' if beating else 'lost'}; one that is silent {told}, deadline {DEADLINE:g} s"
    return Finding(beating and lost, text, {"seconds": round(waited, 3)})


def flipped_bytes_are_refused(*, mutant: str | None = None) -> Finding:
    """Of two files that another host is sent, the one with a flipped byte is refused and leaves nothing under its name;
    the other is taken whole. ``mutant`` "believed" takes what came for what was announced."""
    identity = RunIdentity("distill", {"distill": {}}, {}, "a" * 64, "b" * 64)
    own = following(identity, 1)
    with tempfile.TemporaryDirectory(prefix="latentforge-") as folder:
        data = Path(folder) / "a" / "corpus"
        data.mkdir(parents=True)
        for name in ("sound", "struck"):
            (data / name).write_bytes(bytes(range(256)) * 8192)
        resolved = {"data": {"path": str(data), "sha256": "c" * 64}}
        source = RunDir.create(Path(folder) / "a", identity, LaunchRecord(identity.run_id, "", resolved))
        target = RunDir.create(Path(folder) / "b", own, LaunchRecord(own.run_id, "", {}))
        reading = read_by(source)
        with open(data / "struck", "r+b") as file:
            file.seek(-1, 2)
            file.write(b"\0")
        with _ends(Link, Link, 30.0) as (here, there):
            sender = threading.Thread(target=lend, args=(here, reading.files, _unsaid), daemon=True)
            sender.start()
            refused = ""
            try:
                with _planted(_Announced(reading) if mutant == "believed" else hashlib):
                    Mirror(target).receive(there, reading.files, _unsaid)
            except (FailedError, HostLost) as error:
                refused = str(error)
        there_now = sorted(path.name for path in target.path.rglob("*") if path.name.startswith(("sound", "struck")))
    text = f"there is {', '.join(there_now) or 'nothing'} now; {refused or 'nothing was refused'}"
    return Finding(there_now == ["sound"] and "struck" in refused, text, {"there": there_now})


def _unsaid(done: int, total: int) -> None:
    """How far it is concerns nobody."""


class _Announced:
    """A hashlib by which whatever comes has the digest that was announced for it."""

    def __init__(self, reading: mirror.Reading) -> None:
        self._digests = iter(reading.files)

    def sha256(self) -> _Announced:
        self._digest = next(self._digests).sha256
        return self

    def update(self, part: bytes) -> None:
        """Nothing is looked at."""

    def hexdigest(self) -> str:
        return self._digest


@contextmanager
def _planted(hashes: Any) -> Iterator[None]:
    before = mirror.hashlib
    mirror.hashlib = hashes
    try:
        yield
    finally:
        mirror.hashlib = before
