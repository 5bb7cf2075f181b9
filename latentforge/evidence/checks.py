"""Executable checks of the evidence contract, on a small run folder that is made for them."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentforge.contracts.finding import Finding


def planted_run(runs: Path, *, seed: int = 7) -> Path:
    """A run folder as a host leaves it: identity, launch record, events, log, effective configuration, weights."""
    from latentforge.events import EventLog
    from latentforge.spec.identity import RunIdentity
    from latentforge.spec.run import LaunchRecord, RunDir
    from latentforge.verdicts import ExitCode, Outcome, Verdict

    spec = {"profile": "smoke", "seed": seed, "distill": {"steps": 2, "learning_rate": 1e-3, "device": "auto"}}
    identity = RunIdentity("distill", spec, {"data": "run:data-" + "1" * 20}, "a" * 64, "b" * 64)
    run = RunDir.create(runs, identity, LaunchRecord(identity.run_id, "c" * 64, {"data": {"run": "data-" + "1" * 20}}))
    requested = {"distill": spec["distill"], "profile": "smoke", "seed": seed}
    effective = {**requested, "distill": {"steps": 2, "learning_rate": 0.001, "device": "cpu"}}
    with open(run.log_file, "w") as text, EventLog(run.events_file, run.run, text=text) as log:
        with log.phase("train"):
            log.ready(requested=requested, effective=effective)
            for step in (1, 2):
                log.step(step, 2, model="student", loss=4.0 - step, learning_rate=1e-3, rows=30, tokens_per_second=1e4)
        log.metric("val_loss", 4.91, step=0, split="heldout")
        log.metric("val_loss", 3.04, step=2, split="heldout")
        measured = {"initial": 4.91, "final": 3.04}
        text_of = "val_loss 3.0400 < 4.9100 at step 2"
        log.verdict(Verdict("F-DISTILL-SMOKE-001", Outcome.PASS, text_of, measured, run.run))
        log.end(ExitCode.PASS)
        timings = dict(log.timings)
    content: dict[str, Any] = {
        "requested": requested,
        "effective": effective,
        "code": "a" * 64,
        "extension": {"sha256": "d" * 64},
        "versions": {"python": "3.11.7"},
        "device": {"kind": "cpu", "name": "a processor"},
        "kernel_backend": "cpu",
        "inputs": {"data": {"sha256": "e" * 64, "tokenizer_sha256": "f" * 64}},
        "seeds": {"torch": seed},
        "timings": timings,
        "peak_memory_bytes": 1 << 28,
        "flops": {"train": 1.5e18},
    }
    run.effective_file.write_text(json.dumps(content, indent=1))
    (run.out / "student").mkdir(parents=True)
    tensor = {"dtype": "F32", "shape": [16, 32], "data_offsets": [0, 2048]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "embed.weight": tensor}).encode()
    weights = len(header).to_bytes(8, "little") + header + hashlib.sha256(b"weights").digest() * 64
    (run.out / "student" / "model.safetensors").write_bytes(weights)
    (run.out / "student" / "config.json").write_text('{"vocab_size": 320}')
    (run.path / "exit.json").write_text(json.dumps({"code": 0, "signal": None, "outcome": "pass"}))
    return run.path


def recorded_run(runs: Path, *, seed: int = 7) -> Path:
    """A planted run with its manifest written and entered into the ledger."""
    from latentforge.evidence.manifest import record
    from latentforge.evidence.statement import build_statement

    run_dir = planted_run(runs, seed=seed)
    host = {"hostname": "planted", "kernel": "6.1"}
    statement = build_statement(run_dir, plan="0" * 64, host=host, dispatched={"agent": "9" * 64}, environ={})
    record(run_dir, statement, wall="2026-11-19T14:02:00Z")
    return run_dir


def one_flipped_byte_is_named(*, mutant: str | None = None) -> Finding:
    """One byte flipped in each file of a run, one after the other, is found and named; the whole run verifies before.

    Mutant ``no_hashing``: a verifier that believes the recorded digests instead of hashing the files.
    """
    from latentforge.evidence.digests import file_sha256
    from latentforge.evidence.ledger import LEDGER
    from latentforge.evidence.verify import verify_evidence
    from latentforge.verdicts import Outcome

    if mutant not in (None, "no_hashing"):
        raise ValueError(f"unknown mutant {mutant!r}")
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        recorded_run(runs, seed=6)
        run_dir = recorded_run(runs)
        believed = {path: file_sha256(path) for path in run_dir.rglob("*") if path.is_file()}
        hasher: Callable[[Path], str] = file_sha256 if mutant is None else believed.__getitem__
        if verify_evidence(run_dir, hasher=hasher).outcome is not Outcome.PASS:
            return Finding(False, "an untouched run does not verify", {"untouched": False})
        files = [*sorted(believed), runs / LEDGER]
        missed = []
        for path in files:
            content = path.read_bytes()
            middle = len(content) // 2
            path.chmod(0o644)
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            result = verify_evidence(run_dir, hasher=hasher)
            named = path.relative_to(run_dir).as_posix() if path.is_relative_to(run_dir) else path.name
            if result.outcome is not Outcome.FAIL or not any(problem.what == named for problem in result.problems):
                missed.append(named)
            path.write_bytes(content)
    caught = len(files) - len(missed)
    text = f"{caught} of {len(files)} files with one flipped byte named"
    return Finding(not missed, text, {"files": len(files), "caught": caught, "missed": missed})


def second_write_is_refused(*, mutant: str | None = None) -> Finding:
    """A run's evidence is written once: a second manifest and a second ledger line are refused, the first stay.

    Mutant ``new_name``: the second write goes to another run id, as a copied folder would; that one is accepted.
    """
    from latentforge.errors import RefusedError
    from latentforge.evidence import ledger
    from latentforge.evidence.manifest import record
    from latentforge.evidence.statement import MANIFEST, build_statement

    if mutant not in (None, "new_name"):
        raise ValueError(f"unknown mutant {mutant!r}")
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        run_dir = recorded_run(runs)
        before = ((run_dir / MANIFEST).read_bytes(), (runs / ledger.LEDGER).read_bytes())
        target = run_dir if mutant is None else planted_run(runs, seed=8)
        statement = build_statement(target, plan=None, host={}, dispatched={"again": True}, environ={})
        refused = 0
        writes: tuple[Callable[[], object], ...] = (
            lambda: record(target, statement),
            lambda: ledger.append(runs / ledger.LEDGER, target.name, "0" * 64),
        )
        for write in writes:
            try:
                write()
            except RefusedError:
                refused += 1
        same = before == ((run_dir / MANIFEST).read_bytes(), (runs / ledger.LEDGER).read_bytes())
    text = f"{refused} of 2 second writes refused, first bytes {'kept' if same else 'changed'}"
    return Finding(refused == 2 and same, text, {"refused": refused, "kept": same})


def a_claim_is_marked(*, mutant: str | None = None) -> Finding:
    """A conclusion without a check that ran is marked a claim, and one that is marked otherwise does not verify.

    Mutant ``promoted``: the statement's claim is rewritten as checked, with the ledger entered for those bytes.
    """
    from latentforge.evidence.manifest import record
    from latentforge.evidence.statement import Claim, build_statement
    from latentforge.evidence.verify import verify_evidence
    from latentforge.verdicts import Outcome

    if mutant not in (None, "promoted"):
        raise ValueError(f"unknown mutant {mutant!r}")
    with tempfile.TemporaryDirectory() as folder:
        run_dir = planted_run(Path(folder))
        claims = [Claim("the OOM killer ended it"), Claim("KD helped", check="F-DISTILL-SMOKE-002")]
        statement = build_statement(run_dir, plan=None, host={}, dispatched={}, claims=claims, environ={})
        marks = [one["status"] for one in statement["predicate"]["conclusions"]]
        if mutant == "promoted":
            statement["predicate"]["conclusions"][1]["status"] = "checked"
        record(run_dir, statement)
        verified = verify_evidence(run_dir).outcome is Outcome.PASS
    text = f"conclusions marked {', '.join(marks)}; the statement {'verifies' if verified else 'does not verify'}"
    return Finding(marks == ["checked", "claim", "claim"] and verified, text, {"marks": marks, "verified": verified})


def secrets_stay_out(*, mutant: str | None = None) -> Finding:
    """A credential of the environment that stands in a run's log refuses the statement.

    Mutant ``other_name``: the same value under a variable whose name says nothing is not recognised.
    """
    from latentforge.errors import RefusedError
    from latentforge.evidence.statement import build_statement

    if mutant not in (None, "other_name"):
        raise ValueError(f"unknown mutant {mutant!r}")
    value = "planted-credential-0123456789"
    environ = {"HF_TOKEN" if mutant is None else "GREETING": value}
    with tempfile.TemporaryDirectory() as folder:
        run_dir = planted_run(Path(folder))
        with open(run_dir / "launch.log", "a") as log:
            log.write(f"authorization: {value}\n")
        try:
            build_statement(run_dir, plan=None, host={}, dispatched={}, environ=environ)
        except RefusedError as error:
            said = str(error)
            hidden = value not in said
            text = f"refused: {said}" if hidden else "refused, but the message shows the value"
            return Finding(hidden, text, {"refused": True, "hidden": hidden})
    return Finding(False, "the statement was built over a log that holds a credential", {"refused": False})


def a_signature_says_who(*, mutant: str | None = None) -> Finding:
    """A run that a known key signed is verified under its owner's name; signatures of anything else are refused.

    Mutant ``another_key``: the run is signed with a key that the allowed signers do not name.
    """
    from latentforge.evidence.signatures import SUFFIX
    from latentforge.evidence.signing import sign_evidence
    from latentforge.evidence.statement import MANIFEST
    from latentforge.evidence.verify import verify_evidence
    from latentforge.verdicts import Outcome

    if mutant not in (None, "another_key"):
        raise ValueError(f"unknown mutant {mutant!r}")
    with tempfile.TemporaryDirectory() as folder:
        keys, runs = Path(folder), Path(folder) / "runs"
        if (signers := _planted_keys(keys)) is None:
            return Finding(None, _NO_SSH)
        other, run_dir = recorded_run(runs, seed=6), recorded_run(runs)
        sign_evidence(other, keys / "alice")
        signature = sign_evidence(run_dir, keys / ("alice" if mutant is None else "mallory"))[1]
        standing = verify_evidence(run_dir, signers=signers).standing
        content = signature.read_bytes()
        purpose = _ssh_keygen(
            "-Y", "sign", "-n", "git", "-f", keys / "alice", content=(run_dir / MANIFEST).read_bytes()
        )
        strangers = {
            "another run": (other / f"{MANIFEST}{SUFFIX}").read_bytes(),
            "another purpose": purpose,
            "a cut one": content[: len(content) // 2],
        }
        accepted = []
        signature.chmod(0o644)
        for name, stranger in strangers.items():
            signature.write_bytes(stranger)
            if verify_evidence(run_dir, signers=signers).outcome is not Outcome.FAIL:
                accepted.append(name)
    refused = len(strangers) - len(accepted)
    text = f"{standing}; {refused} of {len(strangers)} signatures of something else refused"
    measured = {"standing": standing, "refused": refused, "accepted": accepted}
    return Finding(standing == f"verified, signed by {_ALICE}" and not accepted, text, measured)


def a_signed_head_holds_the_ledger(*, mutant: str | None = None) -> Finding:
    """A signed head of a ledger, kept elsewhere, vouches for its runs, also when others were added since.

    Mutant ``cut``: the newest line is cut off, with its run; ``anew``: the ledger is chained anew without its first
    run. Both leave what verifies without the head.
    """
    from latentforge.evidence.heads import HEADS
    from latentforge.evidence.ledger import LEDGER, append, read_chain
    from latentforge.evidence.signing import sign_evidence
    from latentforge.evidence.verify import verify_evidence

    if mutant not in (None, "cut", "anew"):
        raise ValueError(f"unknown mutant {mutant!r}")
    with tempfile.TemporaryDirectory() as folder:
        keys, runs = Path(folder), Path(folder) / "runs"
        if (signers := _planted_keys(keys)) is None:
            return Finding(None, _NO_SSH)
        for seed in (5, 6):
            recorded_run(runs, seed=seed)
        _, signature = sign_evidence(runs, keys / "alice")
        (runs / HEADS).rename(keys / "kept")
        entries = read_chain(runs / LEDGER).entries
        if mutant is not None:
            left = entries[:-1] if mutant == "cut" else entries[1:]
            (runs / LEDGER).unlink()
            for entry in left:
                append(runs / LEDGER, entry.run, entry.manifest, wall=entry.wall)
            for gone in {one.run for one in entries} - {one.run for one in left}:
                shutil.rmtree(runs / gone)
        if mutant != "cut":
            recorded_run(runs)
        alone = verify_evidence(runs).outcome
        kept = keys / "kept" / signature.name.removesuffix(".sig")
        held = verify_evidence(runs / entries[0 if mutant != "anew" else 1].run, signers=signers, heads=[kept])
    said = "; ".join(problem.text for problem in held.problems) or held.standing
    text = f"without the head {alone.name}, held against it {held.outcome.name}: {said}"
    measured = {"alone": alone.name.lower(), "held": held.outcome.name.lower(), "entries": held.entries}
    return Finding(held.standing == f"verified, signed by {_ALICE}", text, measured)


_ALICE = "alice@example.org"
_NO_SSH = "ssh-keygen, which makes and checks signatures, is not on this machine"


def _planted_keys(folder: Path) -> Path | None:
    """Keys ``alice`` and ``mallory`` in ``folder``, and the file that allows Alice; None without ``ssh-keygen``."""
    if shutil.which("ssh-keygen") is None:
        return None
    for name in ("alice", "mallory"):
        _ssh_keygen("-q", "-t", "ed25519", "-N", "", "-C", name, "-f", folder / name)
    signers = folder / "signers"
    signers.write_text(f"{_ALICE} {(folder / 'alice.pub').read_text()}")
    return signers


def _ssh_keygen(*arguments: str | Path, content: bytes = b"") -> bytes:
    command = ["ssh-keygen", *map(str, arguments)]
    return subprocess.run(command, input=content, capture_output=True, check=True).stdout
