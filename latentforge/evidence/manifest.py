"""Writing a run's manifest: once, durably, in canonical bytes, and entering it into the ledger."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentforge.errors import RefusedError
from latentforge.evidence import ledger
from latentforge.evidence.once import write_once
from latentforge.evidence.statement import MANIFEST
from latentforge.spec.canonical import canonical_bytes
from latentforge.spec.reading import parse_json, read_regular


def write_manifest(run_dir: Path, statement: Mapping[str, Any]) -> str:
    """Write ``manifest.json`` (RFC 8785) and return its sha256; RefusedError where there is one already."""
    content = canonical_bytes(statement)
    # Beside the run folder, not in it: what a crash leaves behind must not become a file of the run.
    following = f"latentforge evidence verify {run_dir}"
    write_once(run_dir / MANIFEST, content, beside=run_dir.parent, next=following)
    return hashlib.sha256(content).hexdigest()


def record(run_dir: Path, statement: Mapping[str, Any], *, wall: str | None = None) -> ledger.Entry:
    """Write the manifest and enter it into ``ledger.jsonl`` beside the run folder; a second time is refused.

    A manifest that was written before a crash and not entered is entered now, if it covers the same files.
    """
    ledger_path = run_dir.parent / ledger.LEDGER
    if ledger_path.exists() and (earlier := ledger.read_chain(ledger_path).of_run(run_dir.name)) is not None:
        raise RefusedError(
            f"{run_dir.name} is already in {ledger_path} (entry {earlier.entry}): evidence is written once",
            next=f"latentforge evidence verify {run_dir}",
        )
    try:
        sha256 = write_manifest(run_dir, statement)
    except RefusedError:
        content = read_regular(run_dir / MANIFEST)
        if not _says_of(content, statement["subject"]):
            raise
        sha256 = hashlib.sha256(content).hexdigest()
    return ledger.append(ledger_path, run_dir.name, sha256, wall=wall)


def _says_of(content: bytes, subject: Any) -> bool:
    """Whether a manifest that lies there already is one in canonical form, of the same files."""
    try:
        written = parse_json(content)
    except ValueError:
        return False
    return isinstance(written, dict) and written.get("subject") == subject and canonical_bytes(written) == content
