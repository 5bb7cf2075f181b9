"""What a run left: its inventory with digests, and its files, piece by piece."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import exitrec
from .durable import read_json, write_json
from .folders import hash_stream
from .paths import Root, RunPaths
from .protocol import FAIL, UNKNOWN, AgentError, Arguments, Reply
from .state import derive

_CHUNK = 1 << 20
LARGEST_FETCH = 64 << 20


def take_inventory(run: RunPaths, tick: Callable[[], None]) -> str:
    """Write artifacts.json: every regular file that counts, with size and sha256; returns the digest of that list."""
    files: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    wanted = [run.events, run.log, run.effective, run.identity, run.launch]
    for path in sorted(
        [*wanted, *_below(run.out, skipped, run)], key=lambda path: path.relative_to(run.dir).as_posix()
    ):
        name = path.relative_to(run.dir).as_posix()
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError as error:
            skipped.append({"path": name, "why": error.strerror or str(error)})
            continue
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                skipped.append({"path": name, "why": "not a regular file"})
                continue
            sha256, size = hash_stream(file, tick)
        files.append({"path": name, "bytes": size, "sha256": sha256})
    return hashlib.sha256(write_json(run.artifacts, {"files": files, "skipped": skipped})).hexdigest()


def _below(folder: Path, skipped: list[dict[str, str]], run: RunPaths) -> list[Path]:
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        if Path(parent) == folder and "checkpoints" in folders:
            folders.remove("checkpoints")
        for name in [*folders, *names]:
            path = Path(parent, name)
            try:
                path.name.encode("utf-8")
            except UnicodeEncodeError:
                skipped.append({"path": repr(path.relative_to(run.dir).as_posix()), "why": "its name is not UTF-8"})
                continue
            if path.is_symlink():
                skipped.append({"path": path.relative_to(run.dir).as_posix(), "why": "a symbolic link"})
            elif name in names:
                found.append(path)
    return found


def collect(run: RunPaths) -> dict[str, Any]:
    """The inventory of a finished run, proven to be the one that the exit record names."""
    state = derive(run)
    if state["state"] not in ("finished", "finishing"):
        raise _nothing_to_collect(run, state)
    try:
        data = run.artifacts.read_bytes()
    except OSError:
        raise AgentError("refused", f"{run.id} has no artifacts.json: {state['reason']}", code=FAIL) from None
    recorded = (exitrec.read(run.exit) or {}).get("artifacts")
    found = hashlib.sha256(data).hexdigest()
    if found != recorded:
        raise AgentError(
            "corrupt", f"artifacts.json of {run.id} has sha256 {found}, its exit record says {recorded}", code=FAIL
        )
    return {**(read_json(run.artifacts) or {}), "sha256": found, "exit": exitrec.read(run.exit), "state": state}


def _nothing_to_collect(run: RunPaths, state: dict[str, Any]) -> AgentError:
    what = state["state"]
    if what == "absent":
        return AgentError("refused", f"{run.id} is not on this host: it never was, or was cleaned up")
    if what in ("lost", "interrupted"):
        return AgentError(
            "refused",
            f"{run.id} is {what}: {state['reason']}, so nothing vouches for what it left in {run.out}",
            next=f"its log:  latentforge dispatch watch {run.id}",
            code=UNKNOWN,
        )
    return AgentError(
        "refused", f"{run.id} is {what}: its inventory is taken when it ends", next="follow it to its end"
    )


def fetch(root: Root, args: Arguments) -> Reply:
    """Bytes of one regular file inside a run directory; links are not followed, so no path leads outside."""
    run, path = root.run(args.text("run")), args.text("path")
    offset = int(args.number("offset", 0, low=0, high=1 << 62))
    most = int(args.number("max", 4 << 20, low=1, high=LARGEST_FETCH))
    args.done()
    fd = _open_inside(run, path)
    try:
        size = os.fstat(fd).st_size
        data = bytearray()
        while len(data) < most:
            chunk = os.pread(fd, min(_CHUNK, most - len(data)), offset + len(data))
            if not chunk:
                break
            data += chunk
    finally:
        os.close(fd)
    result = {"run": run.id, "path": path, "offset": offset, "bytes": len(data), "total": size}
    return Reply({**result, "eof": offset + len(data) >= size}, bytes(data))


def _open_inside(run: RunPaths, path: str) -> int:
    parts = path.split("/")
    if "\0" in path or not path or any(part in ("", ".", "..") for part in parts):
        raise AgentError("refused", f"path={path!r} is not a plain relative path inside {run.id}")
    current = -1
    try:
        current = os.open(run.dir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        for part in parts[:-1]:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=current)
            os.close(current)
            current = below
        fd = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=current)
    except OSError as error:
        raise AgentError("refused", f"path={path!r} of {run.id} cannot be read: {error.strerror}") from None
    finally:
        if current >= 0:
            os.close(current)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise AgentError("refused", f"path={path!r} of {run.id} is not a regular file")
    return fd
