"""SHA-256 of files and folders, streamed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from latentforge.errors import RefusedError
from latentforge.spec.reading import UnreadableError


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a regular file's bytes, read in blocks; RefusedError for anything that is not a regular file."""
    path = Path(path)
    try:
        # O_NONBLOCK so that a FIFO planted under the name cannot hang the open.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UnreadableError.of(path, error) from error
    with open(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UnreadableError(path, "is not a regular file")
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tree_files(root: str | os.PathLike[str]) -> Iterator[tuple[str, Path]]:
    """The regular files of a folder as (POSIX relative path, path), in the order of their relative paths.

    A symbolic link inside the folder is followed only to a regular file that lies inside the folder as well: what is
    hashed must be what is shipped. Links that lead out, links to folders, sockets, FIFOs and devices are refused, and
    folders that cannot be listed.
    """
    root = Path(root)
    real_root = root.resolve(strict=True)
    found: list[tuple[str, Path]] = []
    folders = [root]
    while folders:
        folder = folders.pop()
        for entry in _listed(folder):
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
                continue
            relative = path.relative_to(root).as_posix()
            try:
                relative.encode()
            except UnicodeEncodeError as error:
                raise RefusedError(f"{str(path)!r} has a name that is not UTF-8") from error
            if "\n" in relative:
                raise RefusedError(f"{relative!r} has a line break in its name")
            if entry.is_symlink():
                try:
                    target = path.resolve(strict=True)
                except (OSError, RuntimeError) as error:  # RuntimeError: links that lead to each other
                    raise RefusedError(f"{path} is a link to nothing ({os.readlink(path)!r})") from error
                if not target.is_relative_to(real_root):
                    raise RefusedError(f"{path} is a link that leads out of {root} (to {str(target)!r})")
                if not target.is_file():
                    raise RefusedError(f"{path} is a link to something that is not a regular file ({target})")
            elif not entry.is_file(follow_symlinks=False):
                raise UnreadableError(path, "is not a regular file")
            found.append((relative, path))
    # Sorted by the encoded path: the same order for every locale and every copy of this rule (the agent has its own).
    found.sort(key=lambda item: item[0].encode())
    yield from found


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UnreadableError.of(folder, error) from error


def tree_sha256(path: str | os.PathLike[str], *, without: str | None = None) -> str:
    """Content digest (hex): of a file its SHA-256; of a folder that of its sorted lines ``<relpath>\\0<sha256>\\n``.

    ``without`` names a folder directly in it that does not count.
    """
    path = Path(path)
    if not path.is_dir():
        return file_sha256(path)
    digest = hashlib.sha256()
    for relative, file in tree_files(path):
        if without is not None and relative.startswith(f"{without}/"):
            continue
        digest.update(f"{relative}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()
