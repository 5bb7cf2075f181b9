"""A run knows its teacher: from its own identity, or from the run that filled its store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentforge.spec.identity import RunIdentity
from latentforge.spec.run import InputRef, LaunchRecord, RunDir
from latentforge.spec.sections import TeacherSpec
from latentforge.spec.teacher import answers_of, reach_of, teacher_of

SERVED = TeacherSpec(
    backend="vllm-remote", url="http://127.0.0.1:9/v1", served_model="m", concurrency=3, timeout=7.0, cache="/c"
)


def made(runs: Path, kind: Any, spec: dict[str, Any], **inputs: InputRef) -> RunDir:
    named = {name: f"run:{ref['run']}" if "run" in ref else f"sha256:{ref['sha256']}" for name, ref in inputs.items()}
    identity = RunIdentity(kind=kind, spec=spec, inputs=named, code="1" * 64, lock="2" * 64)
    runs.mkdir(exist_ok=True)
    return RunDir.create(runs, identity, LaunchRecord(identity.run_id, "k", dict(inputs), reach=reach_of(SERVED)))


def test_what_decides_the_answers_is_the_identitys_and_how_they_are_reached_the_launchs(tmp_path: Path) -> None:
    score = made(tmp_path / "runs", "score", {"teacher": answers_of(SERVED)})
    assert teacher_of(score) == SERVED


def test_a_student_of_a_store_has_the_teacher_that_filled_it(tmp_path: Path) -> None:
    score = made(tmp_path / "runs", "score", {"teacher": answers_of(SERVED)})
    distill = made(tmp_path / "runs", "distill", {}, targets={"run": score.run})
    assert teacher_of(distill).backend == "vllm-remote"


def test_a_student_of_a_file_of_targets_has_a_store_for_a_teacher(tmp_path: Path) -> None:
    (tmp_path / "kept.sqlite").write_bytes(b"")
    ref = {"path": str(tmp_path / "kept.sqlite"), "sha256": "3" * 64}
    found = teacher_of(made(tmp_path / "runs", "distill", {}, targets=ref))
    assert (found.backend, found.store) == ("store", ref["path"])
