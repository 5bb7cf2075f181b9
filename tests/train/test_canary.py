"""A real full pipeline: its canaries train a few steps and pass their gates, and without them its students are refused.

It is a latent student's with a token-level one beside it, so that both kinds have their canary.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentforge.errors import FailedError, RefusedError
from latentforge.events import EventLog, read_events
from latentforge.memory import HostMemory
from latentforge.promotion.checks import with_evidence
from latentforge.promotion.gate import look
from latentforge.spec.canary import REQUIRED
from latentforge.spec.identity import RunIdentity
from latentforge.spec.pipeline import CANARIES, Role
from latentforge.spec.resolve import resolve_pipeline
from latentforge.spec.run import RunDir
from latentforge.train import memory
from latentforge.train.canary import require_canary
from latentforge.train.inprocess import execute_pipeline
from latentforge.train.run import execute
from latentforge.verdicts import ExitCode

SHORT = [
    *("teacher.steps=10", "autoencoder.steps=20", "autoencoder.require=[]", "continuations.count=2"),
    *("distill.steps=12", "distill.require=[]", "latent.steps=12", "latent.require=[]"),
]
Line = dict[Role, RunDir]
both = pytest.mark.parametrize("role", sorted(CANARIES))


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """The folders of a full pipeline on a corpus of the user's."""
    root = tmp_path_factory.mktemp("full")
    (root / "corpus.txt").write_bytes(Path(argparse.__file__).read_bytes() * 3)
    words = ["profile=full", f"data.corpus={root / 'corpus.txt'}", "latent.beside=true", *SHORT]
    return execute_pipeline(resolve_pipeline("tiny-latent", env={}, overrides=words).spec, root, text=io.StringIO())


@both
def test_the_canary_of_a_real_pipeline_passes_its_gates_on_an_early_checkpoint(line: Line, role: Role) -> None:
    events = read_events(line[role].events_file)
    verdicts: dict[str, Any] = {e.fields["falsifier"]: e.fields for e in events if e.kind == "verdict"}
    assert {fields["outcome"] for fields in verdicts.values()} == {"pass"}
    required = REQUIRED[CANARIES[role]]
    assert {*required, "F-EFFECTIVE-CONFIG-001", "F-EFFECTIVE-LR-001", "F-BATCH-ROWS-001"} <= set(verdicts)
    measured = verdicts[required[0]]["measured"]
    assert measured["checkpoint_step"] == 4
    assert measured["bytes"] >= measured["expected_bytes"] > 0
    assert measured["moved"] == measured["tensors"] > 0
    taught = {"distill": ["kd"], "latent": ["val_text", "val_sample", "val_token_kd"]}[CANARIES[role]]
    assert min(measured[signal] for signal in taught) > 1e-3
    assert len([e for e in events if e.kind == "step"]) == 8


@both
@pytest.mark.parametrize("required", [False, True])
def test_the_full_run_names_its_canary_by_content_and_is_refused_without_it(
    line: Line, tmp_path: Path, role: Role, required: bool
) -> None:
    run, section = line[CANARIES[role]], CANARIES[role]
    effective = json.loads(run.effective_file.read_text())
    assert effective["inputs"]["canary"]["run"] == line[role].run
    launch = json.loads(run.launch_file.read_text())
    launch["resolved"].pop("canary")
    without = copied(run, tmp_path, launch)
    if required:
        # To ask the canary's falsifier of a run does not make it a canary.
        identity = run.load_identity()
        spec = {**identity.spec, section: {**identity.spec[section], "require": list(REQUIRED[section])}}
        other = replace(identity, spec=spec)
        without = RunDir(without.path.rename(without.path.with_name(other.run_id)))
        without.identity_file.write_bytes(other.canonical)
    said = io.StringIO()
    assert execute(without.path, text=said) is ExitCode.REFUSED
    assert f"{without.run} is a full run without a canary" in said.getvalue()
    assert not [e for e in read_events(without.events_file) if e.kind == "step"]


def copied(run: RunDir, folder: Path, launch: dict[str, Any]) -> RunDir:
    """A full run before its first step, launched in another way, beside the runs that it builds on but for its
    canary."""
    copy = RunDir(shutil.copytree(run.path, folder / "runs" / run.run))
    for name, ref in run.load_launch().resolved.items():
        if name != "canary":
            (copy.path.parent / ref["run"]).symlink_to(run.path.parent / ref["run"])
    for made in (copy.events_file, copy.effective_file, copy.artifacts_file, copy.log_file):
        made.unlink(missing_ok=True)
    shutil.rmtree(copy.out)
    copy.launch_file.write_text(json.dumps(launch))
    return copy


@both
def test_a_canary_of_other_training_or_code_or_one_that_did_not_pass_vouches_for_nothing(
    line: Line, tmp_path: Path, role: Role
) -> None:
    kind, canary = CANARIES[role], line[role]
    identity, launch = line[kind].load_identity(), json.loads(line[kind].launch_file.read_text())
    run = copied(line[kind], tmp_path, launch)

    def refused(other: RunIdentity, events: bytes) -> str:
        folder = run.path.parent / canary.run
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "identity.json").write_bytes(canary.identity_file.read_bytes())
        (folder / "events.jsonl").write_bytes(events)
        with pytest.raises(RefusedError) as error:
            require_canary(run, other)
        return str(error.value)

    def asked(**values: Any) -> RunIdentity:
        return replace(identity, spec={**identity.spec, kind: {**identity.spec[kind], **values}})

    passed = canary.events_file.read_bytes()
    require_canary(line[kind], asked(steps=10**6))
    assert "it stands for other training" in refused(asked(learning_rate=0.5), passed)
    assert "its code is" in refused(replace(identity, code="9" * 64), passed)
    assert "its lock file is" in refused(replace(identity, lock="9" * 64), passed)
    failed = passed.replace(b'"outcome": "pass"', b'"outcome": "fail"')
    assert failed != passed
    for falsifier in REQUIRED[kind]:
        assert falsifier in refused(identity, failed)
        assert falsifier in refused(identity, b"".join(passed.splitlines(keepends=True)[:5]))


@both
def test_a_canary_of_the_other_kind_vouches_for_nothing(line: Line, tmp_path: Path, role: Role) -> None:
    run = line[CANARIES[role]]
    other = next(line[one] for one in CANARIES if one != role)
    launch = json.loads(run.launch_file.read_text())
    launch["resolved"]["canary"] = {"run": other.run}
    swapped = copied(run, tmp_path, launch)
    (swapped.path.parent / other.run).symlink_to(other.path)
    with pytest.raises(RefusedError, match="it stands for other training"):
        require_canary(swapped, run.load_identity())


@both
def test_a_canary_is_published_by_nobody_although_all_that_is_judged_of_it_passes(
    line: Line, tmp_path: Path, role: Role
) -> None:
    run = line[role].path
    copy = shutil.copytree(run, tmp_path / "runs" / run.name, ignore=shutil.ignore_patterns("checkpoints"))
    for smoke in (False, True):
        unmet = {one.name: one.text for one in look(with_evidence(copy), smoke=smoke).unmet}
        assert "a canary" in unmet.pop("profile")
        assert not unmet.keys() & {"evidence", "configuration", *REQUIRED[CANARIES[role]]}


@both
def test_what_the_canary_was_measured_to_hold_must_be_free_before_the_full_run(
    line: Line, tmp_path: Path, role: Role
) -> None:
    kind, canary = CANARIES[role], line[role]
    run = copied(line[kind], tmp_path, json.loads(line[kind].launch_file.read_text()))
    plan = memory.plan_of(run, run.load_identity())
    assert plan is not None
    held = json.loads(canary.effective_file.read_text())["memory"]["resident_bytes"]
    folder = run.path.parent / canary.run
    folder.mkdir()
    host = HostMemory(total=64 * 2**30, available=60 * 2**30)
    with EventLog(run.events_file, run.run, text=io.StringIO()) as log:
        (folder / "effective.json").write_text(json.dumps({"memory": {"resident_bytes": held}}))
        memory.require_room(run, log, plan, host)
        (folder / "effective.json").write_text(json.dumps({"memory": {"resident_bytes": 50 * 2**30}}))
        with pytest.raises(FailedError, match="first step needs"):
            memory.require_room(run, log, plan, host)
