"""A real full pipeline: its canary trains a few steps and passes its gates, and without it the full run is refused."""

from __future__ import annotations

import argparse
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from latentforge.events import read_events
from latentforge.spec.canary import CANARY
from latentforge.spec.pipeline import Role
from latentforge.spec.run import RunDir
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


def test_the_full_run_names_its_canary_by_content_and_is_refused_without_it(line: dict[Role, RunDir]) -> None:
    run = line["distill"]
    effective = json.loads(run.effective_file.read_text())
    assert effective["inputs"]["canary"]["run"] == line["canary"].run
    without = RunDir(shutil.copytree(run.path, run.path.parent.parent / "elsewhere" / "runs" / run.run))
    for name in ("data", "teacher", "score"):
        (without.path.parent / line[name].run).symlink_to(line[name].path)
    for made in (without.events_file, without.effective_file, without.artifacts_file, without.log_file):
        made.unlink(missing_ok=True)
    shutil.rmtree(without.out)
    launch = json.loads(without.launch_file.read_text())
    launch["resolved"].pop("canary")
    without.launch_file.write_text(json.dumps(launch))
    said = io.StringIO()
    assert execute(without.path, text=said) is ExitCode.REFUSED
    assert f"{run.run} is a full run without a canary" in said.getvalue()
    assert not [e for e in read_events(without.events_file) if e.kind == "step"]
