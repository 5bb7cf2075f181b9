"""What a run's evidence is worth: everything recomputed, in one line and the lines of what does not hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latentforge.errors import LatentForgeError
from latentforge.evidence import verify_evidence
from latentforge.evidence.statement import MANIFEST
from latentforge.report.words import number, once, size
from latentforge.verdicts import Outcome


@dataclass(frozen=True)
class Standing:
    """``word`` (``pass``, ``fail``, ``unknown``), ``line`` and the ``problems`` behind it."""

    word: str
    line: str
    problems: tuple[str, ...] = ()


def standing(folder: Path, *, verify: bool = True, signers: Path | None = None) -> Standing:
    """The evidence of a run's folder, verified now; ``verify=False`` hashes nothing and says so.

    ``signers`` is OpenSSH's allowed signers: with it, evidence that none of them signed does not pass.
    """
    if not (folder / MANIFEST).exists():
        return Standing("unknown", f"no {MANIFEST}: nothing stands behind this run's files")
    if not verify:
        command = f"latentforge evidence verify {folder.name}"
        return Standing("unknown", f"not verified for this report; to do it: {command}")
    try:
        found = verify_evidence(folder, signers=signers)
    except LatentForgeError as error:
        return Standing("fail", "FAILED: the evidence cannot be read", (str(error),))
    problems = tuple(f"{one.what}: {one.text}" for one in found.problems)
    if found.outcome is Outcome.PASS:
        entry = f" · ledger entry {number(found.entry.entry)}" if found.entry is not None else ""
        return Standing("pass", f"{found.standing} · {once(found.subjects, 'file')}, {size(found.bytes)}{entry}")
    word = found.outcome.name.lower()
    return Standing(word, "FAILED: something does not agree" if word == "fail" else "cannot be verified here", problems)
