"""Publishing a student that passed: a folder that is made whole beside its place, and appears there at once."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentforge.errors import FailedError, RefusedError
from latentforge.evidence.digests import file_sha256, tree_files
from latentforge.evidence.signatures import SUFFIX
from latentforge.evidence.statement import MANIFEST
from latentforge.promotion.card import model_card
from latentforge.promotion.gate import PRODUCT, Gate
from latentforge.spec.identity import RUN_ID
from latentforge.verdicts import ExitCode, Outcome

RECORD = "promotion.json"
EVIDENCE = "evidence"
"""The folder, in a published one, of the run's manifest and its signature."""


def publish(gate: Gate, to: Path) -> Path:
    """Publish the student of a gate whose conditions all hold; the folder ``to``, which must not exist.

    Where ``to`` is the same student, published before and whole, nothing is written. FailedError names the conditions
    that do not hold (UnknownOutcome's code where they are not known), RefusedError a place that holds something else.
    """
    if gate.unmet:
        worst = min(one.outcome for one in gate.unmet)
        told = "\n".join(f"  {one.name}  {one.outcome.name}  {one.text}" for one in gate.unmet)
        raise FailedError(
            f"{gate.record.id} is not promoted:\n{told}",
            next=f"latentforge evidence verify {gate.record.folder}",
            code=ExitCode.FAIL if worst is Outcome.FAIL else ExitCode.UNKNOWN,
        )
    to = _place(gate, to)
    if to.exists():
        _same(gate, to)
        return to
    try:
        partial = Path(tempfile.mkdtemp(prefix=".promote-", dir=to.parent))
        try:
            _fill(gate, partial)
            _synchronise(partial)
            partial.chmod(0o755)
            os.rename(partial, to)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise RefusedError(f"{to} cannot be made: {error.strerror}", next="name a folder that can be written") from None
    return to


def _place(gate: Gate, to: Path) -> Path:
    """Where to publish, as one path without links; RefusedError where nothing can be made there, or nothing should."""
    elsewhere = "name a folder that does not exist, outside of every run"
    try:
        to = Path(os.path.abspath(Path(to).expanduser()))
        if to.is_symlink() and not to.exists():
            raise RefusedError(f"{to} is a link to nowhere", next=elsewhere)
        to = to.resolve()
        if not to.exists() and not to.parent.is_dir():
            raise RefusedError(f"{to.parent} is no folder", next=f"mkdir -p {shlex.quote(str(to.parent))}")
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a circle of links, no such user, a NUL
        raise RefusedError(f"{str(to)!r} is no place for a folder: {error}", next=elsewhere) from None
    if any(RUN_ID.fullmatch(one.name) for one in (to, *to.parents)):
        raise RefusedError(f"{to} is a run, or in one: what a run left is not added to", next=elsewhere)
    return to


def read_published(folder: Path) -> dict[str, Any]:
    """The record of a published folder, every file of which was hashed again; FailedError names those that differ."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
        files: dict[str, str] = dict(record["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RefusedError(f"{folder} holds no {RECORD}: it was not made by promote") from None
    found = {name: file_sha256(path) for name, path in tree_files(folder) if name != RECORD}
    wrong = sorted(name for name in {*files, *found} if files.get(name) != found.get(name))
    if wrong:
        raise FailedError(f"{folder}: {', '.join(wrong[:3])} is not what was published ({len(wrong)} of {len(found)})")
    return record


def _fill(gate: Gate, folder: Path) -> None:
    """Weights, tokenizer and configuration as the run left them, the card, and the evidence they stand on."""
    subjects = gate.record.subjects or {}
    for name, path in _published(gate):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        if not name.startswith(f"{EVIDENCE}/") and file_sha256(target) != subjects.get(f"{PRODUCT}/{name}"):
            raise FailedError(f"{PRODUCT}/{name} changed while it was copied")
    (folder / "README.md").write_text(model_card(gate), encoding="utf-8")
    files = {name: file_sha256(path) for name, path in tree_files(folder)}
    (folder / RECORD).write_text(json.dumps({**_origin(gate), "files": files}, indent=1, sort_keys=True) + "\n")


def _published(gate: Gate) -> Iterator[tuple[str, Path]]:
    """The files of the run that are published, by the names that they get."""
    yield from tree_files(gate.product)
    for name in (MANIFEST, MANIFEST + SUFFIX):
        if (gate.record.folder / name).is_file():
            yield f"{EVIDENCE}/{name}", gate.record.folder / name


def _origin(gate: Gate) -> dict[str, Any]:
    entry = gate.verification.entry
    return {
        "schema": 1,
        "run": gate.record.id,
        "manifest": file_sha256(gate.record.folder / MANIFEST),
        "ledger": None if entry is None else {"entry": entry.entry, "wall": entry.wall},
        "evidence": gate.verification.standing,
        "conditions": [{"name": one.name, "text": one.text} for one in gate.conditions],
    }


def _same(gate: Gate, to: Path) -> None:
    """RefusedError unless ``to`` is this run's student, published before."""
    if not to.is_dir() or not (to / RECORD).is_file():
        raise RefusedError(f"{to} exists and was not made by promote", next="name a folder that does not exist")
    there = read_published(to)
    if (there.get("run"), there.get("manifest")) != (gate.record.id, file_sha256(gate.record.folder / MANIFEST)):
        raise RefusedError(
            f"{to} holds {there.get('run')}: what was published is not overwritten",
            next="name a folder that does not exist",
        )
    left = {name: file_sha256(path) for name, path in _published(gate)}
    wrong = sorted(name for name, sha256 in left.items() if there["files"].get(name) != sha256)
    if wrong:  # in the folder and in its own list
        raise FailedError(f"{to / wrong[0]} is not what {gate.record.id} left")


def _synchronise(folder: Path) -> None:
    """Files and folders reach the disk before the name does."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
