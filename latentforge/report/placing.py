"""Where a report's files may lie: never in a run's folder, over nothing but a report's own, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentforge.errors import RefusedError
from latentforge.spec.identity import RUN_ID

GENERATOR = "latentforge report"
"""Stands in the head of each page and each plot: what may be replaced."""
_NEXT = "latentforge report RUN --to report.html"


def check_page(path: Path) -> None:
    """RefusedError where a report may not be written: it is an ``.html`` file, and replaces nothing but a report."""
    if path.suffix != ".html":
        raise RefusedError(f"--to {path}: a report is an .html file", next=_NEXT)
    outside_runs(path, "--to")
    if path.exists() and not _ours(path):
        raise RefusedError(f"--to {path}: is there already and is no report", next=_NEXT)


def check_plot(path: Path) -> None:
    """RefusedError where a plot may not be written: it replaces nothing but a report's plot."""
    if path.exists() and not _ours(path):
        raise RefusedError(f"{path}: is there already and is no plot of a report", next=f"{_NEXT} --no-plots")


def outside_runs(path: Path, option: str) -> None:
    """RefusedError where a path lies in a run's folder, whose evidence a report would break."""
    try:
        place = path.resolve()
    except RuntimeError as error:  # links that lead round
        raise RefusedError(f"{option} {path}: {error}", next=_NEXT) from None
    for folder in (place, *place.parents):
        if RUN_ID.fullmatch(folder.name) and (folder / "identity.json").exists():
            raise RefusedError(
                f"{option} {path}: {folder.name} is a run's folder, whose evidence names each of its files", next=_NEXT
            )


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """What the system does not let be read or written there is a RefusedError, in the system's words."""
    try:
        yield
    except OSError as error:
        told = f"{error.filename or path}: {error.strerror or error}"
        raise RefusedError(f"{path} cannot be written ({told})", next=_NEXT) from None


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that then becomes ``path``; nothing is left of one that was not finished."""
    partial = path.with_name(f".{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _ours(path: Path) -> bool:
    """Whether a file was written by a report."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return GENERATOR.encode() in file.read(4096)
