"""Which code runs: the digest of the files that can change a result, in a checkout or in an installed wheel."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from latentforge.errors import RefusedError

DIGESTED = ("csrc", "latentforge", "contracts", "constraints", "pyproject.toml", "CMakeLists.txt")
"""What the code digest covers. Not ``dispatch``: the agent is addressed and recorded by a digest of its own."""

BUNDLED = (*DIGESTED, "dispatch", "evidence/schema", "README.md", "LICENSE")
"""What a host needs to build the package."""

_PACKAGE = Path(__file__).resolve().parent.parent
_GENERATED = ("__pycache__", "_data")


@dataclass(frozen=True)
class CodeSource:
    """The project's files, by their path in a checkout.

    ``root`` is the checkout, or None for a wheel; ``files`` maps relative POSIX paths to where the file lies.
    """

    root: Path | None
    files: dict[str, Path]

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over the sorted lines ``path NUL sha256 LF`` of the digested files."""
        return digest_of((name, self.read(name)) for name in sorted(self.digested))

    def read(self, name: str) -> bytes:
        """The bytes of one file; RefusedError where it cannot be read, or went away since the files were listed."""
        try:
            return self.files[name].read_bytes()
        except OSError as error:
            raise RefusedError(
                f"{name} of the code cannot be read: {error.strerror}", next="if it was just moved, the same again"
            ) from None

    @property
    def digested(self) -> list[str]:
        """The relative paths that the digest covers."""
        return [name for name in self.files if _under(name, DIGESTED)]

    def lock_sha256(self, lock: str) -> str:
        """sha256 (hex) of ``constraints/<lock>.txt``."""
        path = self.files.get(f"constraints/{lock}.txt")
        if path is None:
            known = sorted(Path(name).stem for name in self.files if name.startswith("constraints/"))
            raise RefusedError(f"lock file {lock!r} is not in constraints/ (there are: {', '.join(known)})")
        return hashlib.sha256(path.read_bytes()).hexdigest()


def digest_of(files: Iterable[tuple[str, bytes]]) -> str:
    """sha256 (hex) over the lines ``path NUL sha256 LF`` of some files with their contents, in the order given."""
    lines = hashlib.sha256()
    for name, content in files:
        lines.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return lines.hexdigest()


def checkout_root(start: Path | None = None) -> Path | None:
    """The LatentForge checkout around a folder (the current one by default), or None."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if _is_checkout(folder):
            return folder
    return None


def code_around(start: Path | None = None) -> CodeSource:
    """The code of the checkout around a folder, else the code of the installed wheel."""
    root = checkout_root(start)
    return _of_checkout(root) if root is not None else running_code()


def running_code() -> CodeSource:
    """The code that this process runs: the checkout of an editable install, else the wheel's own files."""
    root = _PACKAGE.parent
    return _of_checkout(root) if _is_checkout(root) else _of_wheel()


def _of_checkout(root: Path) -> CodeSource:
    names = [name for name in _listed(root) if _under(name, BUNDLED) and not _is_generated(name)]
    real = os.path.realpath(root)
    for name in names:
        _check_portable(name, root / name, real)
    return CodeSource(root, {name: root / name for name in names})


def _check_portable(name: str, path: Path, root: str) -> None:
    """Refuse what a host would not get as it is here: a link to what is no part of the code, an impossible name."""
    if name != name.encode("utf-8", "replace").decode():
        raise RefusedError(
            f"{os.fsencode(name)!r} in {root} has bytes that are not UTF-8 in its name",
            next="rename it, or let .gitignore name it",
        )
    found = os.path.realpath(path)
    if not found.startswith(f"{root}/"):
        raise RefusedError(
            f"{name} is a link that leads out of {root} (to {found}), so its file is no part of the code",
            next="put a copy there, or let .gitignore name it",
        )
    if os.path.isdir(path):
        raise RefusedError(
            f"{name} is a link to a folder, which a host would not get", next="put the folder itself there"
        )


def _of_wheel() -> CodeSource:
    files = {f"latentforge/{name}": path for name, path in _walk(_PACKAGE)}
    data = _PACKAGE / "_data"
    for target, folder in (("contracts", data / "contracts"), ("evidence/schema", data / "schema")):
        files.update({f"{target}/{name}": path for name, path in _walk(folder)})
    files.update(_walk(data / "source"))
    dispatch = _PACKAGE.parent / "dispatch"
    files.update({f"dispatch/{name}": path for name, path in _walk(dispatch)})
    if "pyproject.toml" not in files:
        raise RefusedError(f"the installed package at {_PACKAGE} carries no sources", next="reinstall latentforge")
    return CodeSource(None, files)


def _listed(root: Path) -> Iterator[str]:
    """Tracked and untracked-unignored files; every file where this is no git checkout (an unpacked bundle)."""
    if (root / ".git").exists():
        yield from _of_git(root, BUNDLED)
    else:
        for top in BUNDLED:
            path = root / top
            if path.is_file():
                yield top
            else:
                yield from (f"{top}/{name}" for name, _ in _walk(path))


def _of_git(root: Path, tops: Iterable[str] = ()) -> Iterator[str]:
    """What git would take of a checkout, with that of the checkouts inside it: submodules, and others."""
    listed = ["ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *tops]
    try:
        listing = subprocess.run(["git", "-C", str(root), *listed], capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise RefusedError(
            f"git is not installed, so the files of the checkout {root} cannot be listed", next="install git"
        ) from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        raise RefusedError(f"git ls-files failed in {root}: {said}") from None
    for name in sorted(set(listing.decode("utf-8", "surrogateescape").split("\0")) - {""}):
        inside = root / name
        if not inside.is_dir() or inside.is_symlink():
            if inside.exists():  # not what was deleted here, nor a link to nothing, as editors make for locks
                yield name
        elif (inside / ".git").exists():
            yield from (f"{name.rstrip('/')}/{below}" for below in _of_git(inside))
        else:
            raise RefusedError(
                f"the submodule {name} of {root} is not checked out",
                next=f"git -C {root} submodule update --init {name}",
            )


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not _is_generated(name):
            yield name, path


def _is_generated(name: str) -> bool:
    return name.endswith((".so", ".pyc")) or any(part in _GENERATED for part in name.split("/"))


def _under(name: str, tops: tuple[str, ...]) -> bool:
    return any(name == top or name.startswith(f"{top}/") for top in tops)


def _is_checkout(folder: Path) -> bool:
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text()).get("project", {})
    except (OSError, ValueError):
        return False
    return project.get("name") == "latentforge" and (folder / "latentforge" / "__init__.py").is_file()
