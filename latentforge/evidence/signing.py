"""Signing what was recorded: a run's manifest, or the ledger's head; nothing is signed in which something fails."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from latentforge.errors import FailedError, RefusedError
from latentforge.evidence.heads import sign_head
from latentforge.evidence.ledger import LEDGER
from latentforge.evidence.once import write_once
from latentforge.evidence.signatures import SUFFIX, sign_bytes
from latentforge.evidence.statement import MANIFEST
from latentforge.evidence.verify import verify_evidence
from latentforge.spec.identity import RUN_ID
from latentforge.spec.reading import read_regular
from latentforge.spec.run import named_folder
from latentforge.verdicts import Outcome


def sign_evidence(path: Path, key: Path) -> tuple[str, Path]:
    """Sign a run (its ``manifest.json``) or the ledger of a folder of runs; what was signed, and the signature's file.

    A ledger's runs may be elsewhere: what is signed of them is the digest that the ledger holds. FailedError where a
    run that is here does not verify whole, or the ledger does not; RefusedError where it is signed already, or ``key``
    does not sign. Nothing is left behind where it fails.
    """
    path = named_folder(path)
    if path.name in (MANIFEST, LEDGER) and path.is_file():
        path = path.parent
    signature = path / f"{MANIFEST}{SUFFIX}"
    if RUN_ID.fullmatch(path.name) and os.path.lexists(signature):
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
    # What is signed is what was verified: a file that became another in between is not.
    if verification.run is None:
        assert verification.chain is not None  # or the ledger would be among the problems
        head, signature = sign_head(path, verification.chain, key)
        return f"{LEDGER} up to entry {head.entry}", signature
    content = read_regular(path / MANIFEST)
    if verification.entry is None or hashlib.sha256(content).hexdigest() != verification.entry.manifest:
        raise FailedError(f"{path / MANIFEST} was altered while it was verified, and is not signed")
    write_once(signature, sign_bytes(content, key), beside=path.parent)
    return path.name, signature
