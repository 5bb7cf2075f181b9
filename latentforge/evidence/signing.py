"""Signing what was recorded: a run's manifest, or the ledger's head; only what verifies is signed."""

from __future__ import annotations

from pathlib import Path

from latentforge.errors import FailedError, RefusedError
from latentforge.evidence.heads import sign_head
from latentforge.evidence.ledger import LEDGER
from latentforge.evidence.once import write_once
from latentforge.evidence.signatures import SUFFIX, sign_bytes
from latentforge.evidence.statement import MANIFEST
from latentforge.evidence.verify import verify_evidence
from latentforge.spec.identity import RUN_ID
from latentforge.verdicts import Outcome


def sign_evidence(path: Path, key: Path) -> tuple[str, Path]:
    """Sign a run (its ``manifest.json``) or the ledger of a folder of runs; what was signed, and the signature's file.

    FailedError where it does not verify, or cannot be verified whole here; RefusedError where it is signed already, or
    ``key`` does not sign. Nothing is left behind where it fails.
    """
    path = path.resolve()
    if path.name in (MANIFEST, LEDGER) and path.is_file():
        path = path.parent
    signature = path / f"{MANIFEST}{SUFFIX}"
    if RUN_ID.fullmatch(path.name) and signature.exists():
        raise RefusedError(
            f"{path.name} is signed already: {signature}", next=f"latentforge evidence verify {path} --signers FILE"
        )
    verification = verify_evidence(path)
    if verification.run is None:
        problems = [problem for problem in verification.problems if problem.outcome is Outcome.FAIL]
        problems += [problem for run in verification.runs for problem in run.problems]
    else:
        problems = verification.problems
    if problems:
        first = problems[0]
        raise FailedError(
            f"{path} does not verify, and is not signed: {first.what} {first.text}",
            next=f"latentforge evidence verify {path}",
        )
    if verification.run is None:
        head, signature = sign_head(path, key)
        return f"{LEDGER} up to entry {head.entry}", signature
    write_once(signature, sign_bytes((path / MANIFEST).read_bytes(), key), beside=path.parent)
    return path.name, signature
