"""Each backend of a pipeline opens as itself, cached where that was asked, and `--kd-cache-ro` writes to no cache."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from latentforge.cli import main
from latentforge.errors import RefusedError
from latentforge.events import read_events
from latentforge.spec.sections import PipelineSpec, TeacherSpec
from latentforge.teachers.cached import CachedTeacher
from latentforge.teachers.fixture import FixtureTeacher
from latentforge.teachers.opening import key_of, open_teacher
from latentforge.train.inprocess import execute_pipeline
from latentforge.train.rehearsal import tiny_spec


def short(**teacher: object) -> PipelineSpec:
    spec = tiny_spec()
    return spec.model_copy(
        update={
            "teacher": spec.teacher.model_copy(update={"steps": 2, **teacher}),
            "data": spec.data.model_copy(update={"train_sequences": 24, "heldout_sequences": 4}),
            "distill": spec.distill.model_copy(update={"steps": 2, "require": ()}),
        }
    )


def test_the_fixture_fills_a_store_and_a_student_trains_from_it(tmp_path: Path) -> None:
    runs = execute_pipeline(short(backend="fixture"), tmp_path, text=io.StringIO())
    assert json.loads((runs["score"].out / "score.json").read_text())["teacher"]["backend"] == "fixture"
    assert read_events(runs["distill"].events_file)[-1].fields["code"] == 0


def test_a_cache_is_filled_once_and_read_without_a_write(tmp_path: Path, make_model: Callable[..., object]) -> None:
    make_model(tmp_path / "m")
    spec = TeacherSpec(backend="fixture", cache=str(tmp_path / "cache.sqlite"))
    with pytest.raises(RefusedError):  # read only, and there is none
        open_teacher(spec.model_copy(update={"cache_readonly": True}), tmp_path / "m", "cpu", {}, k=4)
    said: list[str] = []
    teacher = open_teacher(spec, tmp_path / "m", "cpu", {}, k=4, say=said.append)
    assert isinstance(teacher, CachedTeacher)
    assert isinstance(teacher.teacher, FixtureTeacher)
    assert "cache.sqlite" in said[-1]
    teacher.close()
    reading = spec.model_copy(update={"cache_readonly": True})
    teacher = open_teacher(reading, tmp_path / "m", "cpu", {}, k=4, say=said.append)
    assert isinstance(teacher, CachedTeacher)
    assert teacher.store.readonly
    assert "read only" in said[-1]
    teacher.close()
    # Who asks for dense logits is given the teacher itself.
    assert isinstance(open_teacher(spec, tmp_path / "m", "cpu", {}), FixtureTeacher)


def test_the_flag_for_a_cache_that_is_not_named_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dispatch", "plan", "tiny", "--host", "local", "--kd-cache-ro"]) == 2
    assert "cache names no file" in capsys.readouterr().err


def test_a_key_is_read_by_its_name_and_refused_by_its_name() -> None:
    spec = TeacherSpec(backend="openai", url="http://127.0.0.1:9/v1", api_key_env="MY_API_KEY")
    assert key_of(spec, {"MY_API_KEY": "secret-value"}) == "secret-value"
    with pytest.raises(RefusedError) as refused:
        key_of(spec, {})
    assert "MY_API_KEY" in str(refused.value)
    assert "export MY_API_KEY" in str(refused.value.next)


def test_a_key_of_dotenv_reaches_a_plan_as_a_name_only(
    tmp_path: Path,
    make_model: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_model(tmp_path / "m")
    value = "planted-key-0123456789"
    (tmp_path / ".env").write_text(
        f"TEACHER_BACKEND=vllm-remote\nVLLM_REMOTE_URL=http://127.0.0.1:9/v1\nVLLM_REMOTE_API_KEY={value}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what a plan exports stays in this test
    main(["dispatch", "plan", "tiny", "--host", "local", "--set", f"teacher.model={tmp_path / 'm'}", "--json"])
    said = capsys.readouterr()
    assert "VLLM_REMOTE_API_KEY" in said.out
    assert value not in said.out + said.err
