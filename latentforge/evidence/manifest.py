"""Writing a run's manifest: once, durably, in canonical bytes, and entering it into the ledger."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentforge.errors import RefusedError
from latentforge.evidence import ledger
from latentforge.evidence.numbers import parse_json
from latentforge.evidence.statement import MANIFEST
from latentforge.spec.canonical import canonical_bytes


def write_manifest(run_dir: Path, statement: Mapping[str, Any]) -> str:
    """Write ``manifest.json`` (RFC 8785) and return its sha256; RefusedError where there is one already."""
    content = canonical_bytes(statement)
    path = run_dir / MANIFEST
    # Whole or not at all: a full disk must not leave half a manifest under the final name. link() refuses to replace.
    # Beside the run folder, not in it: what a crash leaves behind must not become a file of the run.
    partial = run_dir.parent / f".{run_dir.name}.{MANIFEST}.{os.getpid()}"
    partial.unlink(missing_ok=True)
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o444)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.link(partial, path)
    except FileExistsError:
        raise RefusedError(
            f"{path} exists: evidence is written once", next=f"latentforge evidence verify {run_dir}"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    ledger.sync_folder(run_dir)
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
        content = (run_dir / MANIFEST).read_bytes()
        written = parse_json(content)
        if canonical_bytes(written) != content or written.get("subject") != statement["subject"]:
            raise
        sha256 = hashlib.sha256(content).hexdigest()
    return ledger.append(ledger_path, run_dir.name, sha256, wall=wall)
