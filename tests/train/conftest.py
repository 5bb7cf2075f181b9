"""One data, teacher and score run for all tests of training, and run folders that build on them."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentforge.spec.endurance import EnduranceSpec, meaning_of
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.spec.sections import PipelineSpec
from latentforge.train.inprocess import execute_pipeline, plan
from latentforge.train.rehearsal import tiny_spec
from latentforge.train.run import execute
from latentforge.verdicts import ExitCode

STEPS = 24
MakeRun = Callable[..., RunDir]


def short_spec(**distill: Any) -> PipelineSpec:
    """``tiny`` with a shorter teacher and a shorter student."""
    wanted = {"steps": STEPS, "checkpoint_every": 4, "warmup_steps": 2, "require": ("F-DISTILL-SMOKE-001",), **distill}
    spec = tiny_spec(**wanted)
    return spec.model_copy(
        update={
            "teacher": spec.teacher.model_copy(update={"steps": 30}),
            "data": spec.data.model_copy(update={"train_sequences": 96, "heldout_sequences": 16}),
        }
    )


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs in which data, teacher and targets lie, made once."""
    root = tmp_path_factory.mktemp("upstream")
    execute_pipeline(short_spec(), root, through="score", text=io.StringIO())
    return root / "runs"


@pytest.fixture
def make_run(upstream: Path, tmp_path: Path) -> MakeRun:
    """Make the folder of a distill run, or of the teacher's, beside linked inputs: ``make_run(attempt=1,
    predecessor=None, endurance=None, bad=None, kind="distill", **section)``; ``bad`` is what is asked of bad steps."""
    runs = tmp_path / "runs"
    runs.mkdir()
    for source in upstream.iterdir():
        shutil.copytree(source, runs / source.name)

    def make(
        *,
        attempt: int = 1,
        predecessor: RunDir | None = None,
        profile: str = "smoke",
        endurance: dict[str, Any] | None = None,
        bad: dict[str, Any] | None = None,
        kind: str = "distill",
        **section: Any,
    ) -> RunDir:
        spec = short_spec(**(section if kind == "distill" else {}))
        if kind == "teacher":
            spec = spec.model_copy(update={"teacher": spec.teacher.model_copy(update=section)})
        planned = next(one for one in plan(spec) if one.kind == kind)
        identity = planned.identity.at_attempt(attempt)
        changed = {} if profile == "smoke" else {"profile": profile}
        if bad is not None:  # of this run alone: what lies upstream was made without
            changed["endurance"] = meaning_of(EnduranceSpec.model_validate(bad))
        if changed:
            identity = replace(identity, spec={**identity.spec, **changed})
        before = predecessor.run if predecessor else None
        launch = LaunchRecord(
            identity.run_id, planned.kin, planned.resolved, predecessor=before, endurance=endurance or {}
        )
        return RunDir.create(runs, identity, launch)

    return make


@pytest.fixture
def run_here() -> Callable[[RunDir], tuple[ExitCode, str]]:
    """Execute a run in this process: its exit code and its text log."""

    def run(folder: RunDir) -> tuple[ExitCode, str]:
        text = io.StringIO()
        code = execute(folder.path, text=text)
        return code, text.getvalue()

    return run
