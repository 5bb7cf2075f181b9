"""Faults of what a run left behind: its files, its statement, the ledger, its signature."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentforge.evidence.checks import planted_run, recorded_run
from latentforge.evidence.ledger import LEDGER, Entry, read_chain
from latentforge.evidence.manifest import record
from latentforge.evidence.signing import sign_evidence
from latentforge.evidence.statement import MANIFEST, build_statement
from latentforge.evidence.verify import verify_evidence
from latentforge.spec.canonical import canonical_bytes
from latentforge.spec.reading import parse_json
from latentforge.verdicts import Outcome

from .frame import mutant

Plant = Callable[[Path], object]


def _runs(folder: Path) -> Path:
    """The last of three recorded runs, beside their ledger."""
    runs = folder / "runs"
    runs.mkdir()
    for seed in (5, 6, 7):
        last = recorded_run(runs, seed=seed)
    return last


def _said(path: Path, **asked: Any) -> str | None:
    """The first problem that verification names, if the outcome is no pass."""
    found = verify_evidence(path, **asked)
    if found.outcome is Outcome.PASS:
        return None
    problems = [*found.problems, *(problem for run in found.runs for problem in run.problems)]
    return " ".join(f"{problems[0].what}: {problems[0].text}".split())


def _verified(name: str, plant: Plant, otherwise: Plant, *, how: str, ledger: bool = False) -> None:
    """A fault in a run or its ledger that ``evidence verify`` must name; ``otherwise`` is the same work without it."""

    @mutant("evidence", name, how=how, by="`evidence verify`")
    def _(folder: Path, planted: bool) -> str | None:
        run = _runs(folder)
        (plant if planted else otherwise)(run)
        return _said(run.parent if ledger else run)


def _write(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def _flipped(name: str, bits: int) -> Plant:
    def plant(run: Path) -> None:
        content = bytearray((run / name).read_bytes())
        content[len(content) // 2] ^= bits
        _write(run / name, bytes(content))

    return plant


def _forged(change: Callable[[dict[str, Any]], object]) -> Plant:
    """Another statement, in canonical form, and the ledger chained anew for it: by somebody who knows how."""

    def plant(run: Path) -> None:
        statement = parse_json((run / MANIFEST).read_bytes())
        change(statement)
        content = canonical_bytes(statement)
        _write(run / MANIFEST, content)
        path = run.parent / LEDGER
        *before, last = read_chain(path).entries
        entry = Entry(last.entry, last.prev, last.run, hashlib.sha256(content).hexdigest(), last.wall)
        _write(path, b"".join(one.line for one in (*before, entry)))

    return plant


def _ledger(change: Callable[[list[bytes]], list[bytes]]) -> Plant:
    def plant(run: Path) -> None:
        path = run.parent / LEDGER
        _write(path, b"".join(change(path.read_bytes().splitlines(keepends=True))))

    return plant


def _nothing(statement: dict[str, Any]) -> None:
    """Made anew, ledger and all, and it says what it said."""


def _same_rows(rows: list[bytes]) -> list[bytes]:
    return rows


def _beside(run: Path) -> Path:
    return next(path for path in sorted(run.parent.iterdir()) if path.is_dir() and path != run)


def _manifest_of(chosen: Callable[[Path], Path]) -> Plant:
    return lambda run: _write(run / MANIFEST, (chosen(run) / MANIFEST).read_bytes())


def _log_with(word: bytes) -> Plant:
    """The log says ``word`` where the events say PASS; every digest is made right."""

    def plant(run: Path) -> None:
        log = run / "launch.log"
        _write(log, log.read_bytes().replace(b"F-DISTILL-SMOKE-001 PASS", b"F-DISTILL-SMOKE-001 " + word))
        digest = hashlib.sha256(log.read_bytes()).hexdigest()

        def change(statement: dict[str, Any]) -> None:
            for subject in statement["subject"]:
                if subject["name"] == "launch.log":
                    subject["digest"]["sha256"] = digest

        _forged(change)(run)

    return plant


def _taken_away(run: Path, *, back: bool) -> None:
    content = (run / "launch.log").read_bytes()
    (run / "launch.log").unlink()
    if back:
        (run / "launch.log").write_bytes(content)


def _put_in(run: Path, *, out: bool) -> None:
    (run / "out" / "notes.txt").write_text("better")
    if out:
        (run / "out" / "notes.txt").unlink()


def _swapped(statement: dict[str, Any]) -> None:
    first, second, *_ = statement["subject"]
    first["digest"], second["digest"] = second["digest"], first["digest"]


for _name, _file in (
    ("a flipped byte of the weights", "out/student/model.safetensors"),
    ("a flipped byte of the events", "events.jsonl"),
    ("a flipped byte of the configuration in force", "effective.json"),
    ("a flipped byte of the manifest", MANIFEST),
):
    _verified(_name, _flipped(_file, 1), _flipped(_file, 0), how=f"one bit in the middle of {_file}")


def _statement(name: str, change: Callable[[dict[str, Any]], object], *, how: str) -> None:
    _verified(name, _forged(change), _forged(_nothing), how=f"{how}; the ledger is made anew")


def _rows(name: str, change: Callable[[list[bytes]], list[bytes]], *, how: str) -> None:
    _verified(name, _ledger(change), _ledger(_same_rows), how=how, ledger=True)


_verified(
    "a file taken away",
    functools.partial(_taken_away, back=False),
    functools.partial(_taken_away, back=True),
    how="launch.log is removed",
)
_verified(
    "a file put in",
    functools.partial(_put_in, out=False),
    functools.partial(_put_in, out=True),
    how="out/notes.txt appears",
)
_verified(
    "the manifest of another run",
    _manifest_of(_beside),
    _manifest_of(lambda run: run),
    how="manifest.json is replaced by that of the run before",
)
_verified(
    "a log that says otherwise",
    _log_with(b"FAIL"),
    _log_with(b"PASS"),
    how="PASS becomes FAIL in launch.log; digests are made anew",
)
_statement("digests swapped", _swapped, how="two subjects change digests")
_statement(
    "a verdict edited",
    lambda said: said["predicate"]["verdicts"][0].update(outcome="fail"),
    how="pass becomes fail in the statement",
)
_statement(
    "a measured value edited",
    lambda said: said["predicate"]["verdicts"][0]["measured"].update(final=1.0),
    how="a lower final loss in the statement",
)
_statement(
    "a learning rate in force edited",
    lambda said: said["predicate"]["configuration"]["effective"].update(learning_rate=0.5),
    how="another learning rate in the statement",
)
_statement("seeds edited", lambda said: said["predicate"]["seeds"].update(torch=1), how="another seed in the statement")
_statement(
    "a claim promoted to checked",
    lambda said: said["predicate"]["conclusions"].append({"text": "best", "check": "F-NO-001", "status": "checked"}),
    how="a conclusion without a verdict is marked checked",
)
_rows("a ledger row deleted", lambda rows: rows[:1] + rows[2:], how="its second line")
_rows("ledger rows reordered", lambda rows: [rows[1], rows[0], rows[2]], how="lines 1 and 2 change places")
_rows("a ledger row written twice", lambda rows: [*rows, rows[-1]], how="the last line")
_rows(
    "a ledger row edited",
    lambda rows: [rows[0].replace(b"2026-11-19", b"2026-11-18"), *rows[1:]],
    how="another date in its first line",
)
_rows("a torn ledger", lambda rows: [*rows[:-1], rows[-1][:40]], how="the last line ends early")


@mutant(
    "evidence",
    "a difference left out",
    how="0.5 was in force where 0.001 was asked, and the statement lists no difference; the ledger is made anew",
    by="`evidence verify`",
)
def _(folder: Path, planted: bool) -> str | None:
    run = planted_run(folder)
    in_force = parse_json((run / "effective.json").read_bytes())
    in_force["effective"]["distill"]["learning_rate"] = 0.5
    (run / "effective.json").write_text(json.dumps(in_force))
    record(run, build_statement(run, plan=None, host={}, dispatched={}, environ={}))

    def change(said: dict[str, Any]) -> None:
        differences = said["predicate"]["configuration"]["differences"]
        assert [one["field"] for one in differences] == ["learning_rate"]
        if planted:
            differences.clear()

    _forged(change)(run)
    return _said(run)


def _keys(folder: Path) -> Path:
    for name in ("alice", "mallory"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "signers").write_text(f"alice@example.org {(folder / 'alice.pub').read_text()}")
    return folder


@mutant("signatures", "a signature of another key", how="signed by who is not allowed to", by="`verify --signers`")
def _(folder: Path, planted: bool) -> str | None:
    run, keys = _runs(folder), _keys(folder)
    sign_evidence(run, keys / ("mallory" if planted else "alice"))
    return _said(run, signers=keys / "signers")


@mutant("signatures", "a signature of another run", how="the signature file of the run before", by="`evidence verify`")
def _(folder: Path, planted: bool) -> str | None:
    run, keys = _runs(folder), _keys(folder)
    for one in (run, _beside(run)):
        sign_evidence(one, keys / "alice")
    signature = (_beside(run) if planted else run) / f"{MANIFEST}.sig"
    _write(run / f"{MANIFEST}.sig", signature.read_bytes())
    return _said(run)


@mutant(
    "signatures",
    "a statement forged under a signature",
    how="another agent is named, which nothing but the signature covers; the ledger is made anew",
    by="`evidence verify`",
)
def _(folder: Path, planted: bool) -> str | None:
    run, keys = _runs(folder), _keys(folder)
    sign_evidence(run, keys / "alice")
    _forged((lambda said: said["predicate"]["dispatched"].update(agent="0" * 64)) if planted else _nothing)(run)
    return _said(run)


@mutant("signatures", "a ledger cut behind a signed head", how="its newest line is cut off", by="`evidence verify`")
def _(folder: Path, planted: bool) -> str | None:
    run, keys = _runs(folder), _keys(folder)
    sign_evidence(run.parent, keys / "alice")
    if planted:
        shutil.rmtree(run)
    _ledger((lambda rows: rows[:-1]) if planted else _same_rows)(run)
    return _said(run.parent)


@mutant(
    "evidence",
    "a ledger cut, unsigned",
    how="newest line and run",
    by="a signed head",
    survives=(
        "the newest lines of a ledger that nobody signed can be cut off with their runs, and what is left verifies; "
        "`evidence sign runs/` closes it"
    ),
)
def _(folder: Path, planted: bool) -> str | None:
    run = _runs(folder)
    if planted:
        shutil.rmtree(run)
    _ledger((lambda rows: rows[:-1]) if planted else _same_rows)(run)
    return _said(run.parent)
