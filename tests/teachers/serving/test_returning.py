"""Nothing trains while a stopped teacher's memory is missing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from latentforge.events import read_events
from latentforge.spec.resolve import resolve_pipeline
from latentforge.teachers.opening import open_teacher
from latentforge.teachers.serving.memory import MemoryReturn
from latentforge.teachers.serving.processes import Ended
from latentforge.teachers.serving.server import Stopped
from latentforge.train import teaching
from latentforge.train.inprocess import execute_pipeline
from latentforge.verdicts import ExitCode

GIB = 1 << 30
SHORT = ["teacher.steps=2", "teacher.warmup_steps=0", "data.train_sequences=24", "data.heldout_sequences=8"]


@pytest.mark.parametrize(("after", "code"), [(60, ExitCode.FAIL), (118, ExitCode.PASS)])
def test_a_score_run_whose_teacher_keeps_its_memory_fails_with_the_figures_and_its_rows_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, code: ExitCode
) -> None:
    def opened(*arguments: Any, **named: Any) -> Any:
        teacher: Any = open_teacher(*arguments, **named)
        memory = MemoryReturn(120 * GIB, after * GIB, 4 * GIB, 240.0)
        teacher.stopped = Stopped(Ended(0, None, True), memory)
        return teacher

    monkeypatch.setattr(teaching, "open_teacher", opened)
    spec = resolve_pipeline("tiny", env={}, overrides=SHORT).spec
    said = io.StringIO()
    run = execute_pipeline(spec, tmp_path, through="score", text=said)["score"]
    events = read_events(run.events_file)
    assert events[-1].fields["code"] == code
    (told,) = (e.fields for e in events if "teacher_available_after_bytes" in e.fields)
    assert told["teacher_available_after_bytes"] == after * GIB
    assert (run.out / "targets.sqlite").is_file()
    assert (run.out / "score.json").is_file() == (code == ExitCode.PASS)
    if code == ExitCode.FAIL:
        assert "60.0 GiB available, 120.0 before it started; 60.0 GiB are held" in said.getvalue()
        assert "--attempt next" in said.getvalue()
