"""Pulls one model onto a host: shipped as content, run there by the host's own Python under the agent's supervisor.

It is given the list of files with their sizes and digests. A file has its name only when its bytes are right, the
model has its name when all files have, and the marker by which it counts is written last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from .place import (
    File,
    check_apart,
    check_names,
    digest,
    is_right,
    mark,
    names_below,
    put_in_place,
    set_aside,
    size_of,
    stamps,
    sync,
)
from .web import ATTEMPTS, CHUNK, Again, Hub, Refused, pause, say

WRONG = 3
"""How often a whole file may come with other bytes than the list says."""
FORWARD = 64 << 10
MARGIN = 1 << 30


def main() -> int:
    """Bring the model of the request to its complete state, moving only what is missing or wrong."""
    asked = json.loads(sys.argv[1])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # whatever names the files have that somebody put there
    try:
        return pull(asked)
    except (Again, Refused) as error:
        say(f"error: {error}")
        if isinstance(error, Refused) and error.next is not None:
            say(f"next: {error.next}")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        say(f"error: {error.filename or asked['models']}: {error.strerror}")
        say("next: free some space there, as with:  latentforge dispatch gc" if full else "next: look at that file")
    say("what was verified is kept: the same pull again goes on from there")
    return 1


def pull(asked: dict[str, Any]) -> int:
    """The pull that a request describes; Refused or Again where it cannot be finished."""
    begin = time.monotonic()
    models, name = Path(asked["models"]), str(asked["name"])
    listed = json.loads(Path(asked["list"]).read_bytes())
    files = [File(one["path"], one["bytes"], one["sha256"], tuple(one.get("pieces", ()))) for one in listed["files"]]
    check_names([file.path for file in files])
    place = models / name
    models.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(models / f".lock-{name}", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        place.mkdir(mode=0o700, exist_ok=True)
        final, marker, part = place / "files", place / ".complete.json", place / "part"
        tree = final if final.is_dir() else place / "tree"
        for folder in (tree, part):
            folder.mkdir(mode=0o700, exist_ok=True)
        known = stamps(marker)
        bad = [file for file in files if not is_right(tree, file, known)]
        strangers = sorted(set(names_below(tree)) - {file.path for file in files})
        if not bad and not strangers and final.is_dir():
            say(f"{name} is complete: {len(files)} files, {told(sum(file.bytes for file in files))}; nothing moved")
            mark(place, listed, files)
            summary(name, files, moved=0, fetched=0, aside=[], seconds=time.monotonic() - begin)
            return 0
        with contextlib.suppress(FileNotFoundError):
            marker.unlink()  # from here on nobody takes it for whole
            sync(place)
        for stranger in strangers:
            set_aside(place, tree, stranger)
        check_space(models, bad, part, int(asked.get("margin", MARGIN)))
        source = Pieces(Path(asked["cas"])) if "cas" in asked else Hub(asked)
        for number, file in enumerate(bad, start=1):
            say(f"step {number}/{len(bad)} {file.path} {told(file.bytes)}")
            obtain(source, file, part / file.sha256, float(asked.get("wait", 0.5)))
            put_in_place(part / file.sha256, tree, file)
        check_apart(tree, files)
        for folder in sorted({(tree / file.path).parent for file in files}):
            sync(folder)
        if tree != final:
            os.rename(tree, final)
        mark(place, listed, files)
        for folder in (part, place / "rsync-partial"):
            shutil.rmtree(folder, ignore_errors=True)
        moved = source.moved
        source.finish([piece for file in files for piece in file.pieces])
    total = sum(file.bytes for file in files)
    say(
        f"pulled {name}: {len(files)} files, {told(total)} verified; {told(moved)} moved for {len(bad)} of them"
        + (f"; {len(strangers)} set aside" if strangers else "")
    )
    summary(name, files, moved=moved, fetched=len(bad), aside=strangers, seconds=time.monotonic() - begin)
    return 0


def summary(name: str, files: list[File], *, moved: int, fetched: int, aside: list[str], seconds: float) -> None:
    """What was done, beside the log, for programs and for the evidence."""
    out = Path("out")
    if out.is_dir():
        content = {"model": name, "files": len(files), "bytes": sum(file.bytes for file in files), "aside": aside}
        content |= {"moved": moved, "fetched": fetched, "seconds": round(seconds, 3)}
        (out / "pulled.json").write_text(json.dumps(content, sort_keys=True) + "\n")


def check_space(models: Path, bad: list[File], part: Path, margin: int) -> None:
    """Refuse before the first byte what would fill the disk."""
    missing = sum(max(0, file.bytes - size_of(part / file.sha256)) for file in bad)
    space = os.statvfs(models)
    free = space.f_bavail * space.f_frsize
    if bad and free < missing + margin:
        raise Refused(
            f"{told(missing)} are missing and {told(margin)} must stay free, but {models} has {told(free)} free; "
            "free some space there, as with:  latentforge dispatch gc"
        )


def obtain(source: Pieces | Hub, file: File, part: Path, wait: float) -> None:
    """All bytes of a file under ``part``, verified. Again where failures stay, Refused where the bytes stay wrong."""
    fruitless = wrong = 0
    restarts = source.restarts
    while True:
        before = size_of(part)
        try:
            if before != file.bytes:
                source.fetch(file, part) if isinstance(source, Pieces) else source.get(file.path, file.bytes, part)
            part.touch()  # of an empty file nothing came
            found = digest(part)
            if found == file.sha256:
                with open(part, "rb") as stream:
                    os.fsync(stream.fileno())
                return
            part.unlink()
            wrong += 1
            if wrong >= WRONG:
                raise Refused(f"{file.path} came {wrong} times with sha256 {found[:16]}…, the list says {file.sha256}")
            raise Again(f"it came with sha256 {found[:16]}…, the list says {file.sha256[:16]}…")
        except Again as error:
            fruitless = 0 if size_of(part) - before >= FORWARD else fruitless + 1
            # A server that ignores ranges may cut at another byte each time: each looks like getting on, none ends.
            if source.restarts - restarts >= ATTEMPTS:
                raise Again(f"{file.path}: {error}; given up after {ATTEMPTS} beginnings from its first byte") from None
            if fruitless >= ATTEMPTS:
                raise Again(f"{file.path}: {error}; given up after {fruitless} attempts that brought nothing") from None
            pause(file.path, error, max(1, fruitless), wait, say)


class Pieces:
    """Files that a laptop sent, in pieces that lie among the host's objects."""

    def __init__(self, cas: Path) -> None:
        self._cas = cas
        self.moved = self.restarts = 0

    def fetch(self, file: File, part: Path) -> None:
        """Put a file together from its pieces."""
        with open(part, "wb") as stream:
            for piece in file.pieces:
                try:
                    with open(self._cas / piece, "rb") as content:
                        shutil.copyfileobj(content, stream, CHUNK)
                except FileNotFoundError:
                    raise Refused(f"{file.path}: its piece {piece[:16]}… has not arrived; send it again") from None
        self.moved += size_of(part)
        if size_of(part) != file.bytes:
            raise Refused(f"{file.path} did not arrive whole: {size_of(part)} of {file.bytes} bytes; send it again")

    def finish(self, pieces: list[str]) -> None:
        """Drop the pieces, whose bytes now lie in the model."""
        for piece in pieces:
            (self._cas / piece).unlink(missing_ok=True)


def told(count: int) -> str:
    """Bytes for people."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
