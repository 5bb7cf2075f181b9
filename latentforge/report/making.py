"""From runs' folders to a report's files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from latentforge.errors import RefusedError
from latentforge.evidence.reading import find_run, read_run
from latentforge.report.page import page, section
from latentforge.report.standing import standing
from latentforge.report.words import refuse_folder
from latentforge.spec.identity import RUN_ID

_OURS = b'<meta name="generator" content="latentforge report">'


def make_report(runs: Sequence[str], to: Path | None, *, verify: bool = True) -> Path:
    """Write the page of ``runs`` (folders or beginnings of ids) and return its path.

    RefusedError where a folder is no run's, one is named twice, or ``to`` lies in a run's folder or is something else.
    """
    folders = [find_run(run, next="latentforge report runs/RUN").resolve() for run in runs]
    names = [folder.name for folder in folders]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RefusedError(f"{twice} is named twice", next=f"latentforge report {twice}")
    more = f"-and-{len(folders) - 1}-more" if len(folders) > 1 else ""
    path = (Path("reports") / f"{folders[0].name}{more}.html" if to is None else to).absolute()
    _check(path)
    records = [read_run(folder) for folder in folders]
    named = os.environ.get("EVIDENCE_SIGNERS")
    signers = Path(named) if named else None
    sections = [section(record, standing(record.folder, verify=verify, signers=signers)) for record in records]
    made = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    content = page(sections, made=made).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)
    return path if to is None else to


def _check(path: Path) -> None:
    """A report never becomes a file of a run, whose evidence it would break, and replaces nothing but a report."""
    if path.suffix != ".html":
        raise refuse_folder(path, "a report is an .html file")
    for parent in path.resolve().parents:
        if RUN_ID.fullmatch(parent.name) and (parent / "identity.json").exists():
            raise refuse_folder(path, f"{parent.name} is a run's folder, whose evidence names each of its files")
    if path.exists() and (not path.is_file() or _OURS not in path.read_bytes()[:4096]):
        raise refuse_folder(path, "is there already and is no report")
