"""Recomputing a run's evidence offline: every file, every statement that follows from files, and the ledger's chain."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from latentforge.errors import LatentForgeError, RefusedError, UnknownOutcomeError
from latentforge.evidence.digests import file_sha256, tree_files
from latentforge.evidence.heads import SignedHead, check_heads
from latentforge.evidence.ledger import LEDGER, Chain, Entry, read_chain
from latentforge.evidence.schema import SINCE_2, Statement
from latentforge.evidence.signatures import SUFFIX, Signature, check_signature
from latentforge.evidence.statement import DERIVED, MANIFEST, UNLISTED, checked_conclusions, derive, host_version
from latentforge.spec.canonical import canonical_bytes
from latentforge.spec.identity import RUN_ID
from latentforge.spec.reading import UnreadableError, parse_json, read_regular
from latentforge.spec.run import named_folder
from latentforge.verdicts import Outcome, meet, parse_line

Hash = Callable[[Path], str]
_LONGEST = 1 << 16  # a verdict's line has some hundred characters


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
    chain: Chain | None = None
    """The ledger as it was read, if it is whole."""
    signature: Signature | None = None
    """Of the run's manifest, or of a head of the ledger that covers its entry; of a ledger, of its newest head."""
    signed_entries: int = 0
    """How many lines of the ledger a signed head covers."""

    @property
    def outcome(self) -> Outcome:
        """PASS only where everything was recomputed and agrees."""
        own = [problem.outcome for problem in self.problems]
        return meet([Outcome.PASS, *own, *(run.outcome for run in self.runs)])

    @property
    def entries(self) -> int:
        """How many lines the ledger has."""
        return 0 if self.chain is None else len(self.chain.entries)

    @property
    def signed(self) -> bool:
        """Whether somebody whom the signers name has signed it; of a ledger without a head, each of its runs."""
        each = [self.signature] if self.signature is not None else [run.signature for run in self.runs]
        return bool(each) and all(one is not None and one.signer is not None for one in each)

    @property
    def standing(self) -> str:
        """``verified, unsigned``, or by whom it was signed; ``not verified`` where the outcome is no pass."""
        if self.outcome is not Outcome.PASS:
            return "not verified"
        if self.signature is not None:
            cut = self.run is None and self.signed_entries < self.entries
            return f"verified, {self.signature.told}{f' up to entry {self.signed_entries}' if cut else ''}"
        told = [run.signature.told for run in self.runs if run.signature is not None]
        if not told:
            return "verified, unsigned"
        if len(told) < len(self.runs):
            return f"verified, unsigned but for {len(told)} of its runs"
        return f"verified, each run {'; '.join(dict.fromkeys(told))}"

    def as_json(self) -> dict[str, Any]:
        """The result as JSON-able data."""
        return {
            "path": str(self.path),
            "run": self.run,
            "outcome": self.outcome.name.lower(),
            "signed": self.signed,
            "signature": None if self.signature is None else dict(self.signature.__dict__),
            "signed_entries": self.signed_entries,
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


def verify_evidence(
    path: Path, *, hasher: Hash = file_sha256, signers: Path | None = None, heads: Sequence[Path] = ()
) -> Verification:
    """Verify a run folder, a ``manifest.json``, or a folder of runs with its ledger; nothing is written.

    Signatures that are there are always checked. With ``signers`` (OpenSSH's allowed signers) each run must be signed
    by someone whom that file names, itself or by a head of the ledger that covers it; a run that is signed itself is
    verified without a ledger, too. ``heads`` are signed heads of the ledger that lay elsewhere. RefusedError where the
    path is none of these, or there is no such head. ``hasher`` computes a file's sha256 (the falsifier's control plants
    one that does not).
    """
    given = Path(path)
    if given.name in (MANIFEST, LEDGER) and os.path.isfile(given):
        given = given.parent
    if not os.path.isdir(given):
        raise RefusedError(f"{given} is not a folder", next="latentforge evidence verify runs/")
    for head in heads:
        if not os.path.lexists(head):
            raise RefusedError(f"there is no head of a ledger at {head} (--head)", next="ls runs/heads/")
    path = named_folder(given)
    began = time.monotonic()
    single = RUN_ID.fullmatch(path.name) is not None
    if not single and not os.path.lexists(path / LEDGER):
        raise RefusedError(
            f"{given} is neither a run folder nor a folder with a {LEDGER}", next="latentforge evidence verify runs/"
        )
    ledger = _read_ledger(path.parent if single else path, signers, heads)
    verification = _verify_run(path, ledger, hasher) if single else _verify_ledger(path, ledger, hasher)
    verification.path = given
    verification.seconds = time.monotonic() - began
    return verification


@dataclass(frozen=True)
class _Ledger:
    """The ledger beside the runs as it was read: its chain (None: not there, or broken) and who signed for it.

    ``missing`` is what is said of a run beside which there is none.
    """

    chain: Chain | None
    signed: tuple[SignedHead, ...]
    problems: tuple[Problem, ...]
    signers: Path | None
    missing: Problem | None = None


def _read_ledger(folder: Path, signers: Path | None, kept: Sequence[Path]) -> _Ledger:
    try:
        chain = read_chain(folder / LEDGER) if os.path.lexists(folder / LEDGER) else None
    except LatentForgeError as error:
        return _Ledger(None, (), (_unsound(LEDGER, error),), signers)
    if chain is None:
        text = "is not beside the run, so the manifest's own digest cannot be verified"
        # Who names a head asks whether a ledger is the one that was signed: without one nobody knows.
        unheld = (
            Problem(str(one), f"cannot be held against a {LEDGER}: none is here", Outcome.UNKNOWN) for one in kept
        )
        return _Ledger(None, (), tuple(unheld), signers, Problem(LEDGER, text, Outcome.UNKNOWN))
    found = list(check_heads(folder, chain, signers, kept))
    signed = sorted((one for one in found if isinstance(one, SignedHead)), key=lambda one: one.entry)
    problems = tuple(_unsound(*one) for one in found if not isinstance(one, SignedHead))
    return _Ledger(chain, tuple(signed), problems, signers)


def _unsound(name: str, error: Exception) -> Problem:
    """What an error says of a file; unknown where it is a lack of this machine (a program, a right to read)."""
    if isinstance(error, UnreadableError):
        return Problem(name, error.why, Outcome.UNKNOWN if error.denied else Outcome.FAIL)
    return Problem(name, str(error), Outcome.UNKNOWN if isinstance(error, UnknownOutcomeError) else Outcome.FAIL)


def _verify_ledger(folder: Path, ledger: _Ledger, hasher: Hash) -> Verification:
    result = Verification(folder, problems=[*ledger.problems])
    if ledger.chain is None:
        return result
    result.chain = ledger.chain
    if ledger.signers is not None and not ledger.chain.entries:
        text = f"holds no run that anyone of {ledger.signers} could have signed"
        result.problems.append(Problem(LEDGER, text, Outcome.UNKNOWN))
    if ledger.signed:
        result.signature, result.signed_entries = ledger.signed[-1].signature, ledger.signed[-1].entry
    alone = replace(ledger, problems=())  # said once, of the ledger
    for entry in ledger.chain.entries:
        if os.path.isdir(folder / entry.run):
            result.runs.append(_verify_run(folder / entry.run, alone, hasher))
        else:
            text = f"entry {entry.entry} is not here, so its files cannot be verified"
            result.problems.append(Problem(entry.run, text, Outcome.UNKNOWN))
    try:
        names = sorted(name for name in os.listdir(folder) if RUN_ID.fullmatch(name))
    except OSError as error:
        result.problems.append(_unsound(folder.name, UnreadableError.of(folder, error)))
        names = []
    for name in names:
        if ledger.chain.of_run(name) is None and os.path.lexists(folder / name / MANIFEST):
            result.problems.append(Problem(name, f"has a manifest that is not in {LEDGER}"))
    result.subjects = sum(run.subjects for run in result.runs)
    result.bytes = sum(run.bytes for run in result.runs)
    return result


def _verify_run(run_dir: Path, ledger: _Ledger, hasher: Hash) -> Verification:
    result = Verification(run_dir, run=run_dir.name)
    try:
        content = read_regular(run_dir / MANIFEST)
    except FileNotFoundError:
        result.problems.append(_no_manifest(run_dir, ledger))
        return result
    except LatentForgeError as error:
        result.problems.append(_unsound(MANIFEST, error))
        return result
    _check_ledger(run_dir.name, content, ledger, result)
    _check_signature(run_dir, content, ledger, result)
    # What a ledger is missed for here is the manifest's digest: someone who is known and signed it has said that, too.
    missed = [] if ledger.missing is None or result.signed else [ledger.missing]
    result.problems += [*missed, *ledger.problems]
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


def _no_manifest(run_dir: Path, ledger: _Ledger) -> Problem:
    """Taken away where a ledger or a signature knows of it; a run that was only collected never had one."""
    entered = ledger.problems or (ledger.chain is not None and ledger.chain.of_run(run_dir.name) is not None)
    if entered or os.path.lexists(run_dir / f"{MANIFEST}{SUFFIX}"):
        return Problem(MANIFEST, "is missing")
    text = f"was never recorded, as far as is known here: latentforge dispatch watch {run_dir.name}"
    return Problem(MANIFEST, text, Outcome.UNKNOWN)


def _check_signature(run_dir: Path, content: bytes, ledger: _Ledger, result: Verification) -> None:
    """The manifest's own signature, else the first head that covers its entry; one of them where signers are named."""
    file = run_dir / f"{MANIFEST}{SUFFIX}"
    if os.path.lexists(file):
        try:
            result.signature = check_signature(content, file, ledger.signers)
        except LatentForgeError as error:
            result.problems.append(_unsound(file.name, error))
            return
    elif (entry := result.entry) is not None:
        covering = [one.signature for one in ledger.signed if one.entry >= entry.entry]
        result.signature = covering[0] if covering else None
    if ledger.signers is not None and result.signature is None:
        text = f"is not signed by anyone of {ledger.signers}: latentforge evidence sign {run_dir.name}"
        result.problems.append(Problem(MANIFEST, text, Outcome.UNKNOWN))


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
    except (ValueError, LatentForgeError) as error:
        result.problems.append(Problem(MANIFEST, f"cannot be read as JSON: {error}"))
        return None
    if canonical != content:
        result.problems.append(Problem(MANIFEST, "is not in canonical form (RFC 8785): it was altered"))
    named = statement["predicate"]["run"]["id"]
    if named != result.run:
        result.problems.append(Problem(MANIFEST, f"is the manifest of {named}, not of {result.run}"))
    return statement


def _check_ledger(run: str, content: bytes, ledger: _Ledger, result: Verification) -> None:
    if ledger.chain is None:
        return
    result.chain = ledger.chain
    entry = ledger.chain.of_run(run)
    if entry is None:
        result.problems.append(Problem(MANIFEST, f"{run} is not in {LEDGER}"))
        return
    result.entry = entry
    sha256 = hashlib.sha256(content).hexdigest()
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
        result.problems.append(_unsound(run_dir.name, error))
        return {}
    found: dict[str, str] = {}
    for name in sorted(recorded):
        if name not in present:
            result.problems.append(Problem(name, "is missing"))
            continue
        try:
            result.bytes += os.stat(present[name]).st_size
            found[name] = hasher(present[name])
        except OSError as error:
            result.problems.append(_unsound(name, UnreadableError.of(present[name], error)))
            continue
        except LatentForgeError as error:
            result.problems.append(_unsound(name, error))
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
    try:
        result.problems += list(_unfounded(run_dir, statement["predicate"], digests))
    except LatentForgeError as error:
        result.problems.append(Problem("statement", f"cannot be derived again: {error}"))
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        # Files whose digests agree and whose content has not the shape that their names promise.
        result.problems.append(Problem("statement", f"cannot be derived again: {type(error).__name__}: {error}"))


def _unfounded(run_dir: Path, predicate: Mapping[str, Any], digests: Mapping[str, str]) -> Iterator[Problem]:
    derived = _plain(derive(run_dir, digests))
    for name in DERIVED:
        if not _alike(derived[name], predicate[name]):
            yield Problem(MANIFEST, f"predicate.{name} does not follow from the run's files")
    for name, value in derived["identities"].items():
        if predicate["schema"] == 1 and name in SINCE_2:
            continue
        if not _alike(value, predicate["identities"][name]):
            yield Problem(MANIFEST, f"predicate.identities.{name} does not follow from the files")
    for name in ("driver", "kernel"):
        if predicate["identities"][name] != host_version(name, derived, predicate["host"]):
            yield Problem(MANIFEST, f"predicate.identities.{name} is not what the host's facts say")
    drawn = checked_conclusions(derived["verdicts"])
    if drawn != predicate["conclusions"][: len(drawn)]:
        yield Problem(MANIFEST, "predicate.conclusions does not begin with what the verdicts say")
    verdicts = {one["falsifier"]: one["outcome"] for one in predicate["verdicts"]}
    for conclusion in predicate["conclusions"]:
        if (conclusion["status"] == "checked") != (conclusion["check"] in verdicts):
            text = f"the conclusion {conclusion['text']!r} is marked {conclusion['status']}, which it is not"
            yield Problem(MANIFEST, text)
    for falsifier, outcome, stated in _told_otherwise(run_dir, verdicts):
        yield Problem("launch.log", f"says {falsifier} {outcome.upper()}, the events say {stated.upper()}")


def _told_otherwise(run_dir: Path, verdicts: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Verdict lines of this run in the text log that do not say what the events say."""
    log = run_dir / "launch.log"
    if not log.is_file():
        return
    with open(log, encoding="utf-8", errors="replace", newline="\n") as lines:
        begins = True
        while line := lines.readline(_LONGEST):
            verdict = parse_line(line) if begins and line.startswith("F-") else None
            begins = line.endswith("\n")
            if verdict is None or verdict.run != run_dir.name:
                continue
            stated = verdicts.get(verdict.falsifier, "nothing")
            if stated != verdict.outcome.name.lower():
                yield verdict.falsifier, verdict.outcome.name.lower(), stated


def _alike(derived: Any, stated: Any) -> bool:
    """Whether two JSON values are the same to the letter: for Python, true is 1."""
    return canonical_bytes(derived) == canonical_bytes(stated)


def _plain(value: Any) -> Any:
    """The value as it reads after a round through JSON."""
    return parse_json(json.dumps(value))


def _differ(recorded: str, found: str) -> str:
    return f"sha256 {recorded[:12]}… recorded, {found[:12]}… found"
