"""A real full pipeline: its canary trains a few steps and passes its gates, and without it the full run is refused."""

from __future__ import annotations

import argparse
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentforge.errors import RefusedError
from latentforge.events import read_events
from latentforge.spec.canary import CANARY
from latentforge.spec.identity import RunIdentity
from latentforge.spec.pipeline import Role
from latentforge.spec.run import RunDir
from latentforge.train.canary import require_canary
from latentforge.train.inprocess import execute_pipeline
from latentforge.train.rehearsal import tiny_spec
from latentforge.train.run import execute
from latentforge.verdicts import ExitCode


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> dict[Role, RunDir]:
    """The folders of a full pipeline on a corpus of the user's."""
    root = tmp_path_factory.mktemp("full")
    (root / "corpus.txt").write_bytes(Path(argparse.__file__).read_bytes() * 3)
    spec = tiny_spec(steps=12, require=())
    data = spec.data.model_copy(update={"corpus": str(root / "corpus.txt")})
    spec = spec.model_copy(update={"profile": "full", "data": data})
    return execute_pipeline(spec, root, text=io.StringIO())


def test_the_canary_of_a_real_pipeline_passes_its_gates_on_an_early_checkpoint(line: dict[Role, RunDir]) -> None:
    events = read_events(line["canary"].events_file)
    verdicts: dict[str, Any] = {e.fields["falsifier"]: e.fields for e in events if e.kind == "verdict"}
    assert {fields["outcome"] for fields in verdicts.values()} == {"pass"}
    assert {CANARY, "F-EFFECTIVE-CONFIG-001", "F-EFFECTIVE-LR-001", "F-BATCH-ROWS-001"} <= set(verdicts)
    measured = verdicts[CANARY]["measured"]
    assert measured["checkpoint_step"] == 4
    assert measured["bytes"] >= measured["expected_bytes"] > 0
    assert measured["moved"] == measured["tensors"] > 0
    assert measured["kd"] > 1e-3
    assert len([e for e in events if e.kind == "step"]) == 8


def test_the_full_run_names_its_canary_by_content_and_is_refused_without_it(
    line: dict[Role, RunDir], tmp_path: Path
) -> None:
    run = line["distill"]
    effective = json.loads(run.effective_file.read_text())
    assert effective["inputs"]["canary"]["run"] == line["canary"].run
    launch = json.loads(run.launch_file.read_text())
    launch["resolved"].pop("canary")
    without = copied(line, tmp_path, launch)
    said = io.StringIO()
    assert execute(without.path, text=said) is ExitCode.REFUSED
    assert f"{run.run} is a full run without a canary" in said.getvalue()
    assert not [e for e in read_events(without.events_file) if e.kind == "step"]


def copied(line: dict[Role, RunDir], folder: Path, launch: dict[str, Any]) -> RunDir:
    """The full run before its first step, launched in another way, beside the runs that it builds on."""
    run = line["distill"]
    copy = RunDir(shutil.copytree(run.path, folder / "runs" / run.run))
    for name in ("data", "teacher", "score"):
        (copy.path.parent / line[name].run).symlink_to(line[name].path)
    for made in (copy.events_file, copy.effective_file, copy.artifacts_file, copy.log_file):
        made.unlink(missing_ok=True)
    shutil.rmtree(copy.out)
    copy.launch_file.write_text(json.dumps(launch))
    return copy


def test_a_canary_of_other_training_or_code_or_one_that_did_not_pass_vouches_for_nothing(
    line: dict[Role, RunDir], tmp_path: Path
) -> None:
    identity, launch = line["distill"].load_identity(), json.loads(line["distill"].launch_file.read_text())
    run, canary = copied(line, tmp_path, launch), line["canary"]

    def refused(other: RunIdentity, events: bytes) -> str:
        folder = run.path.parent / canary.run
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "identity.json").write_bytes(canary.identity_file.read_bytes())
        (folder / "events.jsonl").write_bytes(events)
        with pytest.raises(RefusedError) as error:
            require_canary(run, other)
        return str(error.value)

    passed = canary.events_file.read_bytes()
    longer = {**identity.spec, "distill": {**identity.spec["distill"], "steps": 10**6}}
    require_canary(line["distill"], replace(identity, spec=longer))
    steeper = {**identity.spec, "distill": {**identity.spec["distill"], "learning_rate": 0.5}}
    assert "it stands for other training" in refused(replace(identity, spec=steeper), passed)
    assert "its code is" in refused(replace(identity, code="9" * 64), passed)
    assert "its lock file is" in refused(replace(identity, lock="9" * 64), passed)
    failed = passed.replace(b'"outcome": "pass"', b'"outcome": "fail"')
    assert failed != passed
    assert CANARY in refused(identity, failed)
    assert f"did not pass {CANARY}" in refused(identity, b"".join(passed.splitlines(keepends=True)[:5]))
