"""A pipeline leads to its runs; content names inputs, paths do not."""

from __future__ import annotations

import pytest

from latentforge.errors import RefusedError
from latentforge.spec.pipeline import PlannedRun, effective_pipeline, external_paths, pipeline_runs
from latentforge.spec.resolve import resolve_pipeline
from latentforge.spec.sections import PipelineSpec
from latentforge.spec.teacher import ANSWERS, REACH

CODE, LOCK, CONTENT = "1" * 64, "2" * 64, "3" * 64


def runs(*overrides: str, digests: dict[str, str] | None = None, code: str = CODE) -> dict[str, PlannedRun]:
    spec, _ = effective_pipeline(resolve_pipeline("smoke", overrides=list(overrides)).spec)
    return {run.kind: run for run in pipeline_runs(spec, digests=digests or {}, code=code, lock=LOCK)}


def test_the_smoke_pipeline_is_data_teacher_score_distill() -> None:
    planned = runs()
    assert list(planned) == ["data", "teacher", "score", "distill"]
    assert planned["distill"].identity.inputs["targets"] == f"run:{planned['score'].run_id}"
    assert planned["distill"].resolved["data"] == {"run": planned["data"].run_id}


def test_a_runs_identity_holds_every_field_of_its_section() -> None:
    spec = PipelineSpec()
    for kind, run in runs().items():
        of_kind = run.identity.spec[kind]
        fields = set(type(getattr(spec, kind)).model_fields)
        # A run that trains its teacher means its shape and steps, not how a teacher that exists is reached.
        assert of_kind.keys() == (fields - {*ANSWERS, *REACH, "model", "store"} if kind == "teacher" else fields)
        assert run.identity.spec["seed"] == spec.seed
    planned = runs()["distill"].identity.spec
    assert planned["distill"]["student"].keys() == type(spec.distill.student).model_fields.keys()
    assert planned["profile"] == "smoke"
    full = runs("profile=full", "data.corpus=/c", digests={"/c": CONTENT})
    assert full["distill"].identity.spec["profile"] == "full"


def test_a_temperature_without_stored_tails_plans_live_dense_targets_and_says_so() -> None:
    spec = resolve_pipeline("smoke", env={"T": "2"}).spec
    effective, notes = effective_pipeline(spec)
    assert effective.distill.targets == "live"
    assert len(notes) == 1
    assert "T = 2" in notes[0]
    assert "live" in notes[0]
    assert [run.kind for run in pipeline_runs(effective, digests={}, code=CODE, lock=LOCK)] == [
        "data", "teacher", "distill",
    ]  # fmt: skip


def test_a_stored_temperature_keeps_the_store_and_says_nothing() -> None:
    spec = resolve_pipeline("smoke", overrides=["score.temperatures=[1.0, 2.0]", "distill.temperature=2"]).spec
    effective, notes = effective_pipeline(spec)
    assert (effective.distill.targets, notes) == ("store", [])


def test_moving_a_corpus_changes_no_run_id_but_changing_it_changes_all() -> None:
    here = runs("data.corpus=/a/corpus", digests={"/a/corpus": CONTENT})
    moved = runs("data.corpus=/b/other", digests={"/b/other": CONTENT})
    changed = runs("data.corpus=/a/corpus", digests={"/a/corpus": "4" * 64})
    assert {kind: run.run_id for kind, run in here.items()} == {kind: run.run_id for kind, run in moved.items()}
    assert all(here[kind].run_id != changed[kind].run_id for kind in here)
    assert here["data"].resolved["corpus"] == {"path": "/a/corpus", "sha256": CONTENT}


def test_a_teacher_folder_brings_its_tokenizer_and_replaces_the_teacher_run() -> None:
    planned = runs("teacher.model=/models/t", digests={"/models/t": CONTENT})
    assert list(planned) == ["data", "score", "distill"]
    assert planned["data"].identity.inputs["tokenizer"] == f"sha256:{CONTENT}"
    assert planned["score"].identity.inputs["teacher"] == f"sha256:{CONTENT}"
    assert planned["distill"].identity.inputs["teacher"] == f"sha256:{CONTENT}"


def test_only_the_users_own_files_are_external() -> None:
    assert list(external_paths(PipelineSpec())) == []
    spec = resolve_pipeline("smoke", env={"TEACHER_REPO": "/t", "STUDENT_INIT": "/s"}).spec
    assert [(p.field, p.path) for p in external_paths(spec)] == [
        ("teacher.model", "/t"), ("distill.student.init", "/s"),
    ]  # fmt: skip


def test_runs_that_differ_in_code_alone_are_kin() -> None:
    old, new = runs(code=CODE), runs(code="9" * 64)
    assert all(old[kind].kin == new[kind].kin and old[kind].run_id != new[kind].run_id for kind in old)
    other = runs("data.sequence_length=64")
    assert all(old[kind].kin != other[kind].kin for kind in old)


@pytest.mark.parametrize(
    ("overrides", "value"),
    [(["profile=full"], "stdlib"), (["profile=full", "data.corpus=/c", "distill.student.frozen=true"], "frozen")],
)
def test_full_refuses_what_is_only_fit_for_smoke(overrides: list[str], value: str) -> None:
    with pytest.raises(RefusedError, match=value):
        runs(*overrides, digests={"/c": CONTENT})
