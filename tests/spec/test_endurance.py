"""What is asked of a long run: part of its meaning where it may change what is computed, else of how it is carried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from latentforge.spec.endurance import TRAINING, EnduranceSpec, carriage_of, endurance_of, meaning_of
from latentforge.spec.identity import RunIdentity
from latentforge.spec.pipeline import effective_pipeline, pipeline_runs
from latentforge.spec.resolve import resolve_pipeline
from latentforge.spec.run import LaunchRecord, RunDir


def ids(*asked: str) -> dict[str, str]:
    spec, _notes = effective_pipeline(resolve_pipeline("tiny-latent", env={}, overrides=[*asked]).spec)
    return {run.kind: run.run_id for run in pipeline_runs(spec, digests={}, code="a" * 64, lock="b" * 64)}


@pytest.mark.parametrize(
    "carried", ["keep_newest=5", "keep_nth=3", "disk_floor_mib=1", "stop_grace=60.0", "restarts=3"]
)
def test_how_a_run_is_carried_is_no_part_of_its_id(carried: str) -> None:
    assert ids(f"endurance.{carried}") == ids()


def test_what_is_done_about_a_bad_step_is_part_of_what_every_training_means_and_of_no_other_run() -> None:
    usual, other = ids(), ids("endurance.on_bad_step='skip'")
    assert usual["data"] == other["data"]
    for kind in usual.keys() & set(TRAINING):
        assert usual[kind] != other[kind], kind


def test_both_parts_come_together_again_in_the_run(tmp_path: Path) -> None:
    asked = EnduranceSpec(on_bad_step="skip", divergence_factor=3.0, keep_newest=4, restarts=2)
    identity = RunIdentity("distill", {"endurance": meaning_of(asked)}, {}, "a" * 64, "b" * 64)
    launch = LaunchRecord(identity.run_id, "kin", {}, endurance=carriage_of(asked))
    assert endurance_of(RunDir.create(tmp_path, identity, launch)) == asked
    assert meaning_of(asked).keys().isdisjoint(carriage_of(asked))


@pytest.mark.parametrize(
    "asked",
    [
        {"keep_newest": 0},
        {"keep_nth": 0},
        {"divergence_factor": 1.0},
        {"stop_grace": 0.0},
        {"restarts": -1},
        {"disk_floor_mib": -1},
        {"on_bad_step": "ignore"},
        {"keep_newest": 1, "on_bad_step": "skip", "divergence_factor": 2.0},
    ],
)
def test_what_cannot_be_meant_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EnduranceSpec(**asked)
