"""Removal of what nobody on this host needs any more, as ``rubbish`` judges it.

Things are renamed out of the way under the locks of those who use them, and deleted after that: a crash leaves nothing
half alive.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import locks
from .durable import sync_folder
from .paths import Root
from .protocol import BUSY, AgentError
from .rubbish import BUILDING, REMOVING, Rubbish, Wishes


def apply(root: Root, wishes: Wishes, mine: str | None, names: list[dict[str, Any]]) -> dict[str, Any]:
    """Remove of the named things those that still can go; answers what went, what did not, and how much came free."""
    shown = {(str(one.get("room")), str(one.get("name"))) for one in names}
    guard = locks.wait_for(root.reserve_lock, 30.0) if root.locks.is_dir() else None
    if guard is None:
        raise AgentError("busy", "a reservation or a launch has been going on for 30 s", next="try again", code=BUSY)
    removed: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    graves: list[tuple[Path, dict[str, Any]]] = []
    try:
        items = {(item["room"], item["name"]): item for item in Rubbish(root, wishes, mine).items}
        skipped += [
            {"room": room, "name": name, "why": "it is needed now, or gone"}
            for room, name in sorted(shown - set(items))
        ]
        for key, item in items.items():
            if key not in shown:
                continue
            try:
                grave, why = _out_of_the_way(root, item), "somebody uses it now"
            except OSError as error:
                grave, why = None, f"it cannot be moved: {error.strerror}"
            if grave is None:
                skipped.append({"room": item["room"], "name": item["name"], "why": why})
            else:
                graves.append((grave, item))
        for room in ("runs", "builds", "venvs", "models", "cas", "agent"):
            if (folder := getattr(root, room)).is_dir():
                sync_folder(folder)
    finally:
        locks.release(guard)
    for grave, item in graves:
        if _delete(grave):
            removed.append(item)
        else:
            skipped.append({"room": item["room"], "name": item["name"], "why": f"what is left of it lies in {grave}"})
    return {"removed": removed, "skipped": skipped, "bytes": sum(item["bytes"] for item in removed)}


def _out_of_the_way(root: Root, item: dict[str, Any]) -> Path | None:
    """Rename a thing to a name that nobody looks for, while nobody can be using it; None where somebody is."""
    room, name = item["room"], item["name"]
    if room == "rest":
        folder, _, left = name.partition("/")
        if not left.startswith(BUILDING):
            return Path(root.dir, name)  # a name that nobody takes a second time
        with _alone(root.builds / f".lock-{left.removeprefix(BUILDING)}") as alone:
            return _renamed(root.dir / name, root.dir / folder) if alone else None
    if room in ("cas", "agent"):
        home = Path(getattr(root, room))
        path = home / (name if room == "cas" else f"{name}.pyz")
        return _renamed(path, home)
    if room == "runs":
        run = root.run(name)
        try:
            lock = locks.take(run.lock, patience=0.2)
        except FileNotFoundError:
            return None
        if lock is None:
            return None
        try:
            # Every process of a run holds its lock, and a launch waits for the lock that this removal holds.
            return _renamed(run.dir, root.runs)
        finally:
            locks.release(lock)
    home = Path(getattr(root, room))
    with _alone(home / f".lock-{name}") as alone:
        return _renamed(home / name, home) if alone else None


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Hold the lock of whoever makes a build, an environment or a model; False where somebody does."""
    with open(lock, "w") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def _renamed(path: Path, folder: Path) -> Path | None:
    grave = folder / f"{REMOVING}{path.name}-{os.urandom(4).hex()}"
    try:
        os.rename(path, grave)
    except FileNotFoundError:
        return None
    return grave


def _delete(path: Path) -> bool:
    """Delete a file or a tree, folders that may not be written to as well; whether all of it is gone."""
    if path.is_dir() and not path.is_symlink():
        for parent, folders, _files in os.walk(path):
            for name in [".", *folders]:
                inside = os.path.join(parent, name)
                if not os.path.islink(inside):
                    with contextlib.suppress(OSError):  # another user's, or gone meanwhile
                        os.chmod(inside, stat.S_IRWXU)
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
    return not os.path.lexists(path)
