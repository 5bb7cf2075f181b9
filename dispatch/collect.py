"""Bringing a finished run home: each file by its digest, in pieces, resumable, named only when whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from dispatch.following.cursor import STREAMS
from dispatch.places import Places, private_folder, write_atomic, writing
from dispatch.transport.call import Transport
from dispatch.transport.retry import call
from latentforge.errors import BusyError, FailedError
from latentforge.evidence.digests import file_sha256

CHUNK = 4 << 20
_PART = re.compile(r"\.lf-[0-9a-f]{32}\.part")
_LOCK_SECONDS = 300.0


@dataclass(frozen=True)
class Collected:
    """A run's copy: where it lies, what came, and what was there already."""

    folder: Path
    files: int
    bytes: int
    fetched: int
    left: tuple[str, ...] = ()
    """What the run left and cannot be copied (links, names that are not UTF-8), each with the reason."""

    @property
    def told(self) -> str:
        """What was left on the host, for the end of a line; nothing where all came."""
        return f"; {len(self.left)} stay on the host: {', '.join(self.left[:3])}" if self.left else ""

    def as_json(self) -> dict[str, Any]:
        """The copy for programs."""
        return {**asdict(self), "folder": str(self.folder), "left": list(self.left)}


def collect(
    transport: Transport, run: str, places: Places, *, tell: Callable[[str, int, int], None] = lambda *_: None
) -> Collected:
    """Copy what a finished run left into ``<evidence>/<run>``; each file is verified against the host's inventory.

    ``tell(path, done, total)`` hears of progress in bytes. FailedError where a file does not have the digest that the
    exit record vouches for, and for one that is here with other bytes: nothing here is ever overwritten. Two commands
    that collect the same run take turns.
    """
    inventory = call(transport, "collect", {"run": run}, timeout=300.0).result
    folder = places.run(run)
    with locked(places, run):
        folder.mkdir(parents=True, exist_ok=True)  # for whom the umask says, unlike the laptop's state
        followed = places.followed(transport.host.name, run)
        for file in inventory["files"]:
            if file["path"] in STREAMS:
                _take_over(followed / file["path"], folder / file["path"], str(file["sha256"]))
        fetched = sum(_file(transport, run, folder, file, tell) for file in inventory["files"])
        fetched += _file(transport, run, folder, {"path": "artifacts.json", "sha256": inventory["sha256"]}, tell)
        ended = json.dumps(inventory["exit"], indent=1, sort_keys=True).encode() + b"\n"
        if not os.path.lexists(folder / "exit.json"):
            write_atomic(folder / "exit.json", ended)
        elif (folder / "exit.json").read_bytes() != ended:
            raise _altered(folder / "exit.json", run)
        listed = {folder / file["path"] for file in inventory["files"]}
        for leftover in folder.rglob(".*.part"):  # of a file that the host had with other bytes at another time
            if _PART.fullmatch(leftover.name) and leftover not in listed:
                leftover.unlink()
    total = sum(int(file["bytes"]) for file in inventory["files"])
    left = tuple(f"{one['path']} ({one['why']})" for one in inventory.get("skipped", ()))
    return Collected(folder, len(inventory["files"]), total, fetched, left)


@contextmanager
def locked(places: Places, run: str) -> Iterator[None]:
    """Hold the lock of a run's copy on this laptop; BusyError where another command holds it for minutes.

    UnknownOutcomeError where the copy cannot be written."""
    path = places.lock(run)
    try:
        with writing():
            private_folder(path.parent)
        with FileLock(path, timeout=_LOCK_SECONDS), writing():
            yield
    except Timeout:
        raise BusyError(f"another command has been collecting {run} for {_LOCK_SECONDS:.0f} s ({path})") from None


def _file(
    transport: Transport, run: str, folder: Path, file: dict[str, Any], tell: Callable[[str, int, int], None]
) -> int:
    """Fetch one file unless it is here already; returns the bytes that came."""
    name, sha256 = _inside(file["path"]), str(file["sha256"])
    path = folder / name
    if path.is_file() and not path.is_symlink() and file_sha256(path) == sha256:
        return 0
    if os.path.lexists(path):
        raise _altered(path, run)
    # Named by its digest: a name of the run's own may be as long as names can be.
    partial = path.with_name(f".lf-{sha256[:32]}.part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    resumed = partial.is_file() and partial.stat().st_size > 0
    came = _bytes(transport, run, str(name), partial, tell)
    found = file_sha256(partial)
    if found != sha256 and resumed:
        partial.unlink()  # what an earlier command left of it may be what is broken
        came += _bytes(transport, run, str(name), partial, tell)
        found = file_sha256(partial)
    if found != sha256:
        partial.unlink()
        raise FailedError(
            f"{name} of {run} has sha256 {found[:16]}… here, {sha256[:16]}… when the run ended: it was changed on "
            f"{transport.host.name}, or broken on the way",
            next=f"latentforge dispatch collect {run}",
        )
    os.replace(partial, path)
    return came


def _bytes(transport: Transport, run: str, name: str, partial: Path, tell: Callable[[str, int, int], None]) -> int:
    """Append to ``partial`` what is missing of a file; the bytes that came."""
    came = 0
    with open(partial, "ab") as stream:
        while True:
            args = {"run": run, "path": name, "offset": stream.tell(), "max": CHUNK}
            reply = call(transport, "fetch", args, timeout=120.0)
            stream.write(reply.payload)
            came += len(reply.payload)
            tell(name, stream.tell(), int(reply.result["total"]))
            if reply.result["eof"]:
                break
        stream.flush()
        os.fsync(stream.fileno())
    return came


def _altered(path: Path, run: str) -> FailedError:
    """A file has its name only once its bytes were right: other bytes came later, and evidence is never overwritten."""
    return FailedError(
        f"{path} is not what {run} left: it was changed here after it was collected, and is not overwritten",
        next=f"move {path.parent} away, then:  latentforge dispatch collect {run}",
    )


def _take_over(followed: Path, path: Path, sha256: str) -> None:
    """Copy a stream that was followed to its end, so that it need not come a second time."""
    if path.exists() or not followed.is_file() or file_sha256(followed) != sha256:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    copy = path.with_name(f".lf-{sha256[:32]}.part")  # in pieces: a log may be larger than the memory
    shutil.copyfile(followed, copy)
    if file_sha256(copy) == sha256:
        os.replace(copy, path)
    else:
        copy.unlink()


def _inside(path: str) -> PurePosixPath:
    """A relative path that stays inside the run's folder, whatever the host says."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or not pure.parts or any(part in ("..", ".") for part in pure.parts) or "\0" in path:
        raise FailedError(f"the host names a file {path!r}, which would lie outside the run's folder")
    return pure
