"""Recomputing a run's evidence offline: every file, every statement that follows from files, and the ledger's chain."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from latentforge.errors import LatentForgeError, RefusedError
from latentforge.evidence.digests import file_sha256, tree_files
from latentforge.evidence.ledger import LEDGER, Chain, Entry, read_chain
from latentforge.evidence.numbers import parse_json
from latentforge.evidence.schema import Statement
from latentforge.evidence.statement import DERIVED, MANIFEST, UNLISTED, checked_conclusions, derive, host_version
from latentforge.spec.canonical import canonical_bytes
from latentforge.spec.identity import RUN_ID
from latentforge.verdicts import Outcome, meet, parse_line

Hash = Callable[[Path], str]


@dataclass(frozen=True)
class Problem:
    """One thing that does not hold: ``what`` is the file (or part), ``text`` what is wrong with it.

    ``outcome`` is FAIL for what was altered, UNKNOWN for what cannot be verified here.
    """

    what: str
    text: str
    outcome: Outcome = Outcome.FAIL


@dataclass
class Verification:
    """What was recomputed of one run, or of a whole ledger (``run`` is None, ``runs`` holds each)."""

    path: Path
    run: str | None = None
    subjects: int = 0
    bytes: int = 0
    seconds: float = 0.0
    entry: Entry | None = None
    configuration: dict[str, Any] | None = None
    end: dict[str, Any] | None = None
    problems: list[Problem] = field(default_factory=list)
    runs: list[Verification] = field(default_factory=list)
    entries: int = 0

    @property
    def outcome(self) -> Outcome:
        """PASS only where everything was recomputed and agrees."""
        own = [problem.outcome for problem in self.problems]
        return meet([Outcome.PASS, *own, *(run.outcome for run in self.runs)])

    def as_json(self) -> dict[str, Any]:
        """The result as JSON-able data."""
        return {
            "path": str(self.path),
            "run": self.run,
            "outcome": self.outcome.name.lower(),
            "signed": False,
            "subjects": self.subjects,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "ledger_entry": None if self.entry is None else self.entry.entry,
            "ledger_entries": self.entries,
            "differences": None if self.configuration is None else self.configuration["differences"],
            "end": self.end,
            "problems": [{"what": p.what, "text": p.text, "outcome": p.outcome.name.lower()} for p in self.problems],
            "runs": [run.as_json() for run in self.runs],
        }


def verify_evidence(path: Path, *, hasher: Hash = file_sha256) -> Verification:
    """Verify a run folder, a ``manifest.json``, or a folder of runs with its ledger; nothing is written.

    RefusedError where the path is none of these. ``hasher`` computes a file's sha256 (the falsifier's control plants
    one that does not).
    """
    path = Path(path)
    if path.name in (MANIFEST, LEDGER) and path.is_file():
        path = path.parent
    if not path.is_dir():
        raise RefusedError(f"{path} is not a folder", next="latentforge evidence verify runs/")
    if not path.name:
        path = path.resolve()
    began = time.monotonic()
    if RUN_ID.fullmatch(path.resolve().name):
        verification = _verify_run(path.resolve(), None, hasher)
    elif (path / LEDGER).exists():
        verification = _verify_ledger(path, hasher)
    else:
        raise RefusedError(f"{path} is neither a run folder nor a folder with a {LEDGER}")
    verification.path = path
    verification.seconds = time.monotonic() - began
    return verification


def _verify_ledger(folder: Path, hasher: Hash) -> Verification:
    result = Verification(folder)
    try:
        chain = read_chain(folder / LEDGER)
    except LatentForgeError as error:
        result.problems.append(Problem(LEDGER, str(error)))
        return result
    result.entries = len(chain.entries)
    for entry in chain.entries:
        if (folder / entry.run).is_dir():
            result.runs.append(_verify_run(folder / entry.run, chain, hasher))
        else:
            text = f"entry {entry.entry} is not here, so its files cannot be verified"
            result.problems.append(Problem(entry.run, text, Outcome.UNKNOWN))
    for manifest in sorted(folder.glob(f"*/{MANIFEST}")):
        if RUN_ID.fullmatch(manifest.parent.name) and chain.of_run(manifest.parent.name) is None:
            result.problems.append(Problem(manifest.parent.name, f"has a manifest that is not in {LEDGER}"))
    result.subjects = sum(run.subjects for run in result.runs)
    result.bytes = sum(run.bytes for run in result.runs)
    return result


def _verify_run(run_dir: Path, chain: Chain | None, hasher: Hash) -> Verification:
    result = Verification(run_dir, run=run_dir.name)
    try:
        content = (run_dir / MANIFEST).read_bytes()
    except OSError as error:
        result.problems.append(Problem(MANIFEST, f"cannot be read: {error.strerror}"))
        return result
    _check_ledger(run_dir, content, chain, result)
    statement = _statement(content, result)
    if statement is None:
        return result
    result.configuration, result.end = statement["predicate"]["configuration"], statement["predicate"]["end"]
    before = len(result.problems)
    digests = _check_files(run_dir, statement, result, hasher)
    if len(result.problems) == before:
        # Only over whole files: what follows from an altered file differs too, and would bury its name.
        _check_statement(run_dir, statement, digests, result)
    return result


def _statement(content: bytes, result: Verification) -> dict[str, Any] | None:
    """The manifest's statement if it has the right shape and form; problems otherwise."""
    try:
        statement: dict[str, Any] = parse_json(content)
        Statement.model_validate(statement)
        canonical = canonical_bytes(statement)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        result.problems.append(Problem(MANIFEST, f"is not a statement of this schema: {place}: {first['msg']}"))
        return None
    except (ValueError, RecursionError, LatentForgeError) as error:
        result.problems.append(Problem(MANIFEST, f"cannot be read as JSON: {error}"))
        return None
    if canonical != content:
        result.problems.append(Problem(MANIFEST, "is not in canonical form (RFC 8785): it was altered"))
    named = statement["predicate"]["run"]["id"]
    if named != result.run:
        result.problems.append(Problem(MANIFEST, f"is the manifest of {named}, not of {result.run}"))
    return statement


def _check_ledger(run_dir: Path, content: bytes, chain: Chain | None, result: Verification) -> None:
    sha256 = hashlib.sha256(content).hexdigest()
    path = run_dir.parent / LEDGER
    if chain is None:
        if not path.exists():
            text = f"is not beside {run_dir.name}, so the manifest's own digest cannot be verified"
            result.problems.append(Problem(LEDGER, text, Outcome.UNKNOWN))
            return
        try:
            chain = read_chain(path)
        except LatentForgeError as error:
            result.problems.append(Problem(LEDGER, str(error)))
            return
    result.entries = len(chain.entries)
    entry = chain.of_run(run_dir.name)
    if entry is None:
        result.problems.append(Problem(MANIFEST, f"{run_dir.name} is not in {LEDGER}"))
        return
    result.entry = entry
    if entry.manifest != sha256:
        result.problems.append(Problem(MANIFEST, _differ(entry.manifest, sha256)))


def _check_files(run_dir: Path, statement: Mapping[str, Any], result: Verification, hasher: Hash) -> dict[str, str]:
    """Hash every file of the folder against the subjects; returns the digests found."""
    recorded = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    if len(recorded) != len(statement["subject"]):
        result.problems.append(Problem(MANIFEST, "names a subject twice"))
    try:
        present = {name: path for name, path in tree_files(run_dir) if name not in UNLISTED}
    except RefusedError as error:
        result.problems.append(Problem(run_dir.name, str(error)))
        return {}
    found: dict[str, str] = {}
    for name in sorted(recorded):
        if name not in present:
            result.problems.append(Problem(name, "is missing"))
            continue
        try:
            result.bytes += os.stat(present[name]).st_size
            found[name] = hasher(present[name])
        except (OSError, LatentForgeError) as error:
            result.problems.append(Problem(name, f"cannot be read: {error}"))
            continue
        result.subjects += 1
        if found[name] != recorded[name]:
            result.problems.append(Problem(name, _differ(recorded[name], found[name])))
    for name in sorted(set(present) - set(recorded)):
        result.problems.append(Problem(name, "appeared since: it is not in the manifest"))
    return found


def _check_statement(
    run_dir: Path, statement: Mapping[str, Any], digests: Mapping[str, str], result: Verification
) -> None:
    """What the predicate says must be what follows from the files."""
    predicate = statement["predicate"]
    try:
        derived = derive(run_dir, digests)
    except LatentForgeError as error:
        result.problems.append(Problem("statement", f"cannot be derived again: {error}"))
        return
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # Files whose digests agree and whose content has not the shape that their names promise.
        result.problems.append(Problem("statement", f"cannot be derived again: {type(error).__name__}: {error}"))
        return
    for name in DERIVED:
        if _plain(derived[name]) != predicate[name]:
            result.problems.append(Problem(MANIFEST, f"predicate.{name} does not follow from the run's files"))
    for name, value in derived["identities"].items():
        if _plain(value) != predicate["identities"][name]:
            result.problems.append(Problem(MANIFEST, f"predicate.identities.{name} does not follow from the files"))
    for name in ("driver", "kernel"):
        if predicate["identities"][name] != host_version(name, derived, predicate["host"]):
            result.problems.append(Problem(MANIFEST, f"predicate.identities.{name} is not what the host's facts say"))
    drawn = checked_conclusions(derived["verdicts"])
    if _plain(drawn) != predicate["conclusions"][: len(drawn)]:
        result.problems.append(Problem(MANIFEST, "predicate.conclusions does not begin with what the verdicts say"))
    verdicts = {one["falsifier"]: one["outcome"] for one in predicate["verdicts"]}
    for conclusion in predicate["conclusions"]:
        if (conclusion["status"] == "checked") != (conclusion["check"] in verdicts):
            text = f"the conclusion {conclusion['text']!r} is marked {conclusion['status']}, which it is not"
            result.problems.append(Problem(MANIFEST, text))
    for falsifier, outcome, stated in _told_otherwise(run_dir, verdicts):
        text = f"says {falsifier} {outcome.upper()}, the events say {stated.upper()}"
        result.problems.append(Problem("launch.log", text))


def _told_otherwise(run_dir: Path, verdicts: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Verdict lines of this run in the text log that do not say what the events say."""
    log = run_dir / "launch.log"
    if not log.is_file():
        return
    with open(log, encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            if not line.startswith("F-"):
                continue
            verdict = parse_line(line)
            if verdict is None or verdict.run != run_dir.name:
                continue
            stated = verdicts.get(verdict.falsifier, "nothing")
            if stated != verdict.outcome.name.lower():
                yield verdict.falsifier, verdict.outcome.name.lower(), stated


def _plain(value: Any) -> Any:
    """The value as it reads after a round through JSON."""
    return parse_json(json.dumps(value))


def _differ(recorded: str, found: str) -> str:
    return f"sha256 {recorded[:12]}… recorded, {found[:12]}… found"
