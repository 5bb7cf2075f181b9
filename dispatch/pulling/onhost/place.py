"""Where a pulled model lies on its host, and when a file of it is right.

models/<name>/files/          the model, whole
models/<name>/.complete.json  what was verified: sizes, digests, and the stamps by which a later change is seen
models/<name>/tree/           verified files on the way there
models/<name>/part/<sha256>   beginnings of files, taken up again by the next pull
models/<name>/aside/          files that are in no list, moved out of the model, never deleted by a pull
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .web import CHUNK, Refused, say

_LONGEST_NAME = 255


class File(NamedTuple):
    """One file of a model, as the list has it; ``pieces`` are the objects that it was sent in, if it was sent."""

    path: str
    bytes: int
    sha256: str
    pieces: tuple[str, ...] = ()


def stamps(marker: Path) -> dict[str, list[int]]:
    """How the files looked when they were verified; empty where that is not known."""
    try:
        return {one["path"]: one["stamp"] for one in json.loads(marker.read_bytes())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def stamp(path: Path) -> list[int]:
    """What changes whenever a file's bytes do: inode, size, and both times of change."""
    found = os.lstat(path)
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def is_right(tree: Path, file: File, known: dict[str, list[int]]) -> bool:
    """Whether the file is there with the bytes of the list; read again unless it is untouched since it was verified."""
    path = tree / file.path
    try:
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size != file.bytes:
            return False
        return known.get(file.path) == stamp(path) or digest(path) == file.sha256
    except (FileNotFoundError, NotADirectoryError):
        return False


def digest(path: Path) -> str:
    """The sha256 of a file."""
    whole = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            whole.update(chunk)
    return whole.hexdigest()


def names_below(tree: Path) -> Iterator[str]:
    """Everything below a folder that is no folder."""
    for parent, folders, names in os.walk(tree):
        for name in [*names, *(one for one in folders if os.path.islink(os.path.join(parent, one)))]:
            yield Path(parent, name).relative_to(tree).as_posix()


def check_names(names: list[str]) -> None:
    """Refuse a list with a path that would lie elsewhere, that no folder can hold, or that is there twice."""
    for name in names:
        if not name or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise Refused(f"the list names {name!r}, which is not a plain path")
        if not name.isprintable() or name != name.encode("utf-8", "replace").decode():
            raise Refused(f"the list names {name!r}, which is not plain text in UTF-8")
        if any(len(part.encode()) > _LONGEST_NAME for part in name.split("/")):
            raise Refused(
                f"the list names {name[:40]!r}…, with more than the {_LONGEST_NAME} bytes that a name can have"
            )
    if len(set(names)) != len(names):
        raise Refused("the list names a file twice")
    folders = {
        "/".join(parts[:count]) for parts in (name.split("/") for name in names) for count in range(1, len(parts))
    }
    if both := sorted(folders & set(names)):
        raise Refused(f"the list names {both[0]!r} as a file and as a folder")


def check_apart(tree: Path, files: list[File]) -> None:
    """Refuse a file system on which two files of the list are one: where upper and lower case are the same, say."""
    seen: dict[tuple[int, int], File] = {}
    for file in files:
        found = os.lstat(tree / file.path)
        other = seen.setdefault((found.st_dev, found.st_ino), file)
        if other.sha256 != file.sha256:
            raise Refused(f"{other.path} and {file.path} are one file on the file system of {tree}")


def size_of(path: Path) -> int:
    """The bytes of a file, none where there is no such file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def set_aside(place: Path, tree: Path, name: str) -> None:
    """Move a file that is in no list out of the model; who put it there will miss it, so it is not deleted."""
    target = place / "aside" / f"{name.replace('/', '--')}-{os.urandom(3).hex()}"
    target.parent.mkdir(mode=0o700, exist_ok=True)
    os.rename(tree / name, target)
    say(f"{name} is not part of this model: moved to {target}")


def put_in_place(verified: Path, tree: Path, file: File) -> None:
    """Give verified bytes their name."""
    path = tree / file.path
    for parent in reversed(path.relative_to(tree).parents[:-1]):
        standing = tree / parent
        if standing.is_symlink() or (standing.exists() and not standing.is_dir()):
            standing.unlink()
        standing.mkdir(mode=0o700, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        raise Refused(f"{path} is a folder, and should be a file")
    os.chmod(verified, 0o400)
    os.replace(verified, path)
    for extra in (verified.with_suffix(".etag"),):
        extra.unlink(missing_ok=True)


def mark(place: Path, listed: dict[str, Any], files: list[File]) -> None:
    """Write the marker that makes a model count."""
    entries = [
        {"path": file.path, "bytes": file.bytes, "sha256": file.sha256, "stamp": stamp(place / "files" / file.path)}
        for file in files
    ]
    content = {**{name: value for name, value in listed.items() if name != "files"}, "files": entries}
    temporary = place / ".complete.json.new"
    with open(temporary, "w") as stream:
        json.dump({**content, "made": time.time()}, stream, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    os.rename(temporary, place / ".complete.json")
    sync(place)


def sync(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
