"""What a run says of how its teacher computes, and of a GPU that the teacher leaves idle."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from latentforge.events import Event, EventLog, read_events
from latentforge.spec.resolve import resolve_pipeline
from latentforge.spec.run import RunDir
from latentforge.spec.sections import TeacherSpec
from latentforge.teachers.folder import read_safetensors_header
from latentforge.teachers.hf import HFTeacher
from latentforge.teachers.utilisation import IdleWatch
from latentforge.train.inprocess import execute_pipeline
from latentforge.train.teaching import idleness

RUN = "score-0123456789abcdef0123"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


SHORT = ["teacher.steps=2", "teacher.warmup_steps=0", "data.train_sequences=24", "data.heldout_sequences=8"]


def score(root: Path, **teacher: Any) -> tuple[RunDir, str]:
    settings = [*SHORT, *(f"teacher.{name}={value}" for name, value in teacher.items())]
    text = io.StringIO()
    spec = resolve_pipeline("tiny", env={}, overrides=settings).spec
    return execute_pipeline(spec, root, through="score", text=text)["score"], text.getvalue()


@pytest.mark.parametrize(("asked", "dtype"), [("auto", "float32"), ("bf16", "bfloat16")])
def test_the_choice_and_its_reason_are_an_event_a_line_and_the_effective_configuration(
    root: Path, asked: str, dtype: str
) -> None:
    run, said = score(root, precision=asked)
    taken = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    (chosen,) = (e.fields for e in read_events(run.events_file) if e.fields.get("name") == "precision")
    assert (chosen["asked"], chosen["precision"], chosen["dtype"], chosen["device"]) == (asked, taken, dtype, "cpu")
    effective = json.loads(run.effective_file.read_bytes())
    assert effective["effective"]["teacher"]["precision"] == taken
    assert effective["teacher_precision"]["reason"] == chosen["reason"]
    assert f"teacher precision {taken} on cpu: {chosen['reason']}" in said
    assert json.loads((run.out / "score.json").read_bytes())["identity"]["quantization"] == dtype
    if asked == "auto":
        assert chosen["reason"].startswith("no GPU: fp32")


def test_a_student_of_a_live_teacher_is_told_in_what_its_teacher_computes(root: Path) -> None:
    settings = [*SHORT, "distill.targets=live", "distill.steps=2", "distill.warmup_steps=0", "distill.require=[]"]
    settings += ["teacher.precision=bf16"]
    spec = resolve_pipeline("tiny", env={}, overrides=settings).spec
    run = execute_pipeline(spec, root, text=io.StringIO())["distill"]
    (chosen,) = (e.fields for e in read_events(run.events_file) if e.fields.get("name") == "precision")
    assert (chosen["precision"], chosen["dtype"], chosen["reason"]) == ("bf16", "bfloat16", "asked for")
    effective = json.loads(run.effective_file.read_bytes())
    assert effective["effective"]["teacher"]["precision"] == "bf16"
    planned = next(e.fields for e in read_events(run.events_file) if e.kind == "memory")
    assert planned["planned_teacher"] == 2 * teacher_numbers(run)


def teacher_numbers(run: RunDir) -> int:
    """How many numbers the teacher of a run has."""
    path = run.input_path("teacher") / "model" / "model.safetensors"
    return sum(tensor.elements for tensor in read_safetensors_header(path))


def watched(
    folder: Path, teacher_folder: Path, readings: list[float | None], *, asked: str = "auto"
) -> tuple[list[Event], str]:
    """The events of a scoring during which the GPU answered ``readings``, the last one for ever."""
    folder.mkdir(exist_ok=True)
    heard = threading.Event()
    left = list(readings)

    def read() -> float | None:
        if len(left) > 1:
            return left.pop(0)
        heard.set()
        return left[0]

    text = io.StringIO()
    spec = TeacherSpec(precision=asked)  # type: ignore[arg-type]
    watch = IdleWatch(patience=0.0, least=3)
    teacher = HFTeacher.open(teacher_folder)
    with (
        EventLog(folder / "events.jsonl", RUN, text=text) as log,
        idleness(log, teacher, spec, read=read, every=0.0, watch=watch),
    ):
        assert heard.wait(60)
    return read_events(folder / "events.jsonl"), text.getvalue()


def test_a_teacher_that_leaves_the_gpu_idle_is_a_warning_and_a_failed_verdict_once(
    tmp_path: Path, teacher_folder: Path
) -> None:
    events, said = watched(tmp_path / "a", teacher_folder, [0.0] * 9)
    assert [event.kind for event in events] == ["warning", "verdict"]
    assert events[1].fields["falsifier"] == "F-BACKEND-SELECT-001"
    assert events[1].fields["outcome"] == "fail"
    assert "the teacher leaves the GPU idle: below 10 %" in said


def test_who_asked_for_the_slow_path_is_warned_and_not_failed(tmp_path: Path, teacher_folder: Path) -> None:
    events, _ = watched(tmp_path / "a", teacher_folder, [0.0] * 9, asked="fp32")
    assert [event.kind for event in events] == ["warning"]


def test_a_gpu_that_answers_n_a_is_unknown_and_neither_passes_nor_fails(tmp_path: Path, teacher_folder: Path) -> None:
    events, said = watched(tmp_path / "a", teacher_folder, [None] * 9)
    assert events == []
    assert "GPU utilisation while it scored: not known" in said


def test_a_busy_gpu_passes_with_what_was_read(tmp_path: Path, teacher_folder: Path) -> None:
    (verdict,), _ = watched(tmp_path / "a", teacher_folder, [0.0, 90.0, 95.0, 97.0, 96.0, 94.0])
    assert (verdict.kind, verdict.fields["outcome"]) == ("verdict", "pass")
    assert verdict.fields["measured"]["median_percent"] > 90


def test_a_teacher_on_the_cpu_or_elsewhere_is_not_watched(tmp_path: Path, teacher_folder: Path) -> None:
    teacher = HFTeacher.open(teacher_folder)
    with (
        EventLog(tmp_path / "events.jsonl", RUN, text=io.StringIO()) as log,
        idleness(log, teacher, TeacherSpec()),
    ):
        assert not [thread for thread in threading.enumerate() if thread.name == "gpu-utilisation"]
    assert read_events(tmp_path / "events.jsonl") == []


def test_events_of_two_threads_keep_their_order_and_their_numbers(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl", RUN, text=io.StringIO()) as log:
        gate = threading.Barrier(4)

        def write(number: int) -> None:
            gate.wait()
            for _ in range(200):
                log.memory(of=number)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    events = read_events(tmp_path / "events.jsonl")
    assert [event.seq for event in events] == list(range(800))
