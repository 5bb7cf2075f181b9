"""Faults of what a run left behind: its files, its statement, the ledger, its signature."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentforge.evidence.checks import recorded_run
from latentforge.evidence.ledger import LEDGER, Entry, read_chain
from latentforge.evidence.signing import sign_evidence
from latentforge.evidence.statement import MANIFEST
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


def _verified(name: str, plant: Plant, *, how: str, ledger: bool = False) -> None:
    """A fault in a run or its ledger that ``evidence verify`` must name."""

    @mutant("evidence", name, how=how, by="`evidence verify`")
    def _(folder: Path, planted: bool) -> str | None:
        run = _runs(folder)
        if planted:
            plant(run)
        return _said(run.parent if ledger else run)


def _write(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def _flipped(name: str) -> Plant:
    def plant(run: Path) -> None:
        content = bytearray((run / name).read_bytes())
        content[len(content) // 2] ^= 1
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


def _replayed(run: Path) -> None:
    other = next(path for path in sorted(run.parent.iterdir()) if path.is_dir() and path != run)
    _write(run / MANIFEST, (other / MANIFEST).read_bytes())


def _reworded_log(run: Path) -> None:
    """The log says FAIL where the events say PASS; every digest is made right."""
    log = run / "launch.log"
    _write(log, log.read_bytes().replace(b"F-DISTILL-SMOKE-001 PASS", b"F-DISTILL-SMOKE-001 FAIL"))
    digest = hashlib.sha256(log.read_bytes()).hexdigest()

    def change(statement: dict[str, Any]) -> None:
        for subject in statement["subject"]:
            if subject["name"] == "launch.log":
                subject["digest"]["sha256"] = digest

    _forged(change)(run)


def _swapped(statement: dict[str, Any]) -> None:
    first, second, *_ = statement["subject"]
    first["digest"], second["digest"] = second["digest"], first["digest"]


for _name, _file in (
    ("a flipped byte of the weights", "out/student/model.safetensors"),
    ("a flipped byte of the events", "events.jsonl"),
    ("a flipped byte of the configuration in force", "effective.json"),
    ("a flipped byte of the manifest", MANIFEST),
):
    _verified(_name, _flipped(_file), how=f"one bit in the middle of {_file}")

_verified("a file taken away", lambda run: (run / "launch.log").unlink(), how="launch.log is removed")
_verified("a file put in", lambda run: (run / "out" / "notes.txt").write_text("better"), how="out/notes.txt appears")
_verified("digests swapped", _forged(_swapped), how="two subjects change digests; manifest and ledger are made anew")
_verified("the manifest of another run", _replayed, how="manifest.json is replaced by that of the run before")
_verified("a log that says otherwise", _reworded_log, how="PASS becomes FAIL in launch.log; digests are made anew")
_verified(
    "a verdict edited",
    _forged(lambda said: said["predicate"]["verdicts"][0].update(outcome="fail")),
    how="pass becomes fail in the statement; the ledger is made anew",
)
_verified(
    "a measured value edited",
    _forged(lambda said: said["predicate"]["verdicts"][0]["measured"].update(final=1.0)),
    how="a lower final loss in the statement; the ledger is made anew",
)
_verified(
    "a learning rate in force edited",
    _forged(lambda said: said["predicate"]["configuration"]["effective"].update(learning_rate=0.5)),
    how="another learning rate in the statement; the ledger is made anew",
)
_verified(
    "a difference left out",
    _forged(lambda said: said["predicate"]["configuration"].update(differences=[{"field": "steps"}])),
    how="the differences of asked and in force are rewritten; the ledger is made anew",
)
_verified(
    "seeds edited",
    _forged(lambda said: said["predicate"]["seeds"].update(torch=1)),
    how="another seed in the statement; the ledger is made anew",
)
_verified(
    "a claim promoted to checked",
    _forged(
        lambda said: said["predicate"]["conclusions"].append({"text": "best", "check": "F-NO-001", "status": "checked"})
    ),
    how="a conclusion without a verdict is marked checked",
)
_verified("a ledger row deleted", _ledger(lambda rows: rows[:1] + rows[2:]), how="its second line", ledger=True)
_verified(
    "ledger rows reordered",
    _ledger(lambda rows: [rows[1], rows[0], rows[2]]),
    how="lines 1 and 2 change places",
    ledger=True,
)
_verified("a ledger row written twice", _ledger(lambda rows: [*rows, rows[-1]]), how="the last line", ledger=True)
_verified(
    "a ledger row edited",
    _ledger(lambda rows: [rows[0].replace(b"2026-11-19", b"2026-11-18"), *rows[1:]]),
    how="another date in its first line",
    ledger=True,
)
_verified(
    "a torn ledger", _ledger(lambda rows: [*rows[:-1], rows[-1][:40]]), how="the last line ends early", ledger=True
)


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
    other = next(path for path in sorted(run.parent.iterdir()) if path.is_dir() and path != run)
    for one in (run, other):
        sign_evidence(one, keys / "alice")
    if planted:
        (run / f"{MANIFEST}.sig").unlink()
        shutil.copy(other / f"{MANIFEST}.sig", run)
    return _said(run)


@mutant("signatures", "a statement forged under a signature", how="a lower loss, made anew", by="`evidence verify`")
def _(folder: Path, planted: bool) -> str | None:
    run, keys = _runs(folder), _keys(folder)
    sign_evidence(run, keys / "alice")
    if planted:
        _forged(lambda said: said["predicate"]["dispatched"].update(agent="0" * 64))(run)
    return _said(run)


@mutant("signatures", "a ledger cut behind a signed head", how="its newest line is cut off", by="`evidence verify`")
def _(folder: Path, planted: bool) -> str | None:
    run, keys = _runs(folder), _keys(folder)
    sign_evidence(run.parent, keys / "alice")
    if planted:
        shutil.rmtree(run)
        _ledger(lambda rows: rows[:-1])(run)
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
        _ledger(lambda rows: rows[:-1])(run)
    return _said(run.parent)
