"""What a run's evidence is worth: everything recomputed, in one line and the lines of what does not hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latentforge.errors import LatentForgeError
from latentforge.evidence import verify_evidence
from latentforge.evidence.ledger import LEDGER
from latentforge.evidence.statement import MANIFEST
from latentforge.report.words import number, once, size
from latentforge.verdicts import Outcome


@dataclass(frozen=True)
class Standing:
    """``word`` (``pass``, ``fail``, ``unknown``), ``line`` and the ``problems`` behind it."""

    word: str
    line: str
    problems: tuple[str, ...] = ()


def standing(folder: Path, *, verify: bool = True) -> Standing:
    """The evidence of a run's folder, verified now; ``verify=False`` hashes nothing and says so."""
    command = f"latentforge evidence verify {folder.name}"
    if not (folder / MANIFEST).exists():
        return Standing("unknown", f"no {MANIFEST}: nothing stands behind this run's files")
    if not verify:
        return Standing("unknown", f"not verified for this report; to do it: {command}")
    if not (folder.parent / LEDGER).exists():
        return Standing("unknown", f"no {LEDGER} beside the run: its {MANIFEST} cannot be verified here")
    try:
        found = verify_evidence(folder)
    except LatentForgeError as error:
        return Standing("fail", "FAILED: the evidence cannot be read", (str(error),))
    problems = tuple(f"{one.what}: {one.text}" for one in found.problems)
    if found.outcome is Outcome.PASS and found.entry is not None:
        counted = f"{once(found.subjects, 'file')}, {size(found.bytes)}"
        return Standing("pass", f"verified, {counted}, ledger entry {number(found.entry.entry)}")
    word = found.outcome.name.lower()
    return Standing(word, "FAILED: something was altered" if word == "fail" else "cannot be verified here", problems)
