"""A long run: its checkpoints cost no step, stay as was asked, and are gone on from with the same data alone."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from latentforge.events import read_events
from latentforge.evidence.reading import read_run
from latentforge.history.comparing import picture
from latentforge.promotion.card import held_out_of
from latentforge.report.glance import Figure, figures
from latentforge.report.telling import sentence
from latentforge.spec.run import RunDir
from latentforge.train import checkpoint, distill, keeping, teacher
from latentforge.train.checkpoint import load_checkpoint
from latentforge.train.loop import Trainer
from latentforge.train.run import execute
from latentforge.train.stopping import stop_requested
from latentforge.verdicts import ExitCode

MakeRun = Callable[..., RunDir]
RunHere = Callable[[RunDir], tuple[ExitCode, str]]
TWIN = ("F-DISTILL-SMOKE-002",)


def said(run: RunDir, kind: str, **wanted: Any) -> list[dict[str, Any]]:
    """The fields of a run's events of a kind that have these values."""
    found = [event.fields for event in read_events(run.events_file) if event.kind == kind]
    return [fields for fields in found if wanted.items() <= fields.items()]


def test_steps_go_on_while_a_checkpoint_is_written_and_there_is_one_at_a_time(
    make_run: MakeRun, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    went_on, writing = threading.Event(), threading.Lock()
    save, step = keeping.save_checkpoint, Trainer.step

    def slow(folder: Path, taken: Any, **how: Any) -> Any:
        assert writing.acquire(blocking=False), "two checkpoints are written at once"
        try:
            if taken.step == 4:
                assert went_on.wait(60), "no step was made while the checkpoint was written"
            return save(folder, taken, **how)
        finally:
            writing.release()

    def watched(self: Trainer, number: int, *rest: Any) -> Any:
        if number == 6:
            went_on.set()
        return step(self, number, *rest)

    monkeypatch.setattr(keeping, "save_checkpoint", slow)
    monkeypatch.setattr(Trainer, "step", watched)
    run = make_run(steps=9, checkpoint_every=4)
    _, text = run_here(run)
    assert [fields["step"] for fields in said(run, "checkpoint", model="student")][:3] == [4, 8, 9], text
    # What lies on the disk is what the model held then, not what the steps that followed made of it.
    assert load_checkpoint(run.checkpoints / "step-000008").step == 8


def test_a_checkpoint_that_cannot_be_written_is_the_end_of_the_run(
    make_run: MakeRun, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        if "step-000008" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    run = make_run()
    code, text = run_here(run)
    assert code is ExitCode.FAIL
    assert "step-000008 could not be written: [Errno 28] No space left on device" in text
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000004"]


def test_the_newest_and_every_nth_checkpoint_stay_as_the_spec_says(make_run: MakeRun, run_here: RunHere) -> None:
    run = make_run(steps=11, checkpoint_every=2, endurance={"keep_newest": 1, "keep_nth": 2})
    run_here(run)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [f"step-{step:06d}" for step in (4, 8, 11)]


def test_a_checkpoint_of_other_rows_or_another_order_is_refused(make_run: MakeRun, run_here: RunHere) -> None:
    first = make_run(steps=4)
    run_here(first)
    state = first.checkpoints / "step-000004" / "state.json"
    record = json.loads(state.read_text())
    data = json.loads((first.input_path("data") / "data.json").read_text())
    place = {"rows_sha256": data["shards"]["train.bin"], "seed": 7, "batch_size": 16}
    assert record["position"] == place
    for attempt, (name, other) in enumerate((("rows_sha256", "f" * 64), ("seed", 8), ("batch_size", 4)), start=2):
        state.write_text(json.dumps({**record, "position": {**place, name: other}}))
        code, text = run_here(make_run(steps=4, attempt=attempt, predecessor=first))
        assert code == 2
        assert f"checkpoint of step 4 of {first.run} goes on with rows" in text


def test_a_teacher_that_was_stopped_goes_on_and_ends_with_the_same_bits(
    make_run: MakeRun, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"kind": "teacher", "steps": 9, "checkpoint_every": 3, "validate_every": 2, "keep": "best"}
    whole = make_run(attempt=2, **asked)
    assert run_here(whole)[0] is ExitCode.PASS
    stopped = make_run(attempt=3, **asked)
    signals = iter([None] * 4 + ["SIGTERM"])
    monkeypatch.setattr(teacher, "stop_requested", lambda: next(signals))
    assert run_here(stopped)[0] is ExitCode.UNKNOWN
    monkeypatch.undo()
    resumed = make_run(attempt=4, predecessor=stopped, **asked)
    code, text = run_here(resumed)
    assert code is ExitCode.PASS, text
    assert f"teacher resumes from step 5 of {stopped.run}" in text
    weights = [load_file(run.out / "model" / "model.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    for field in ("loss", "learning_rate", "grad_norm", "batch_sha256"):
        made = [{one["step"]: one[field] for one in said(run, "step", model="teacher")} for run in (whole, resumed)]
        assert made[0] == made[1]
        assert len(made[0]) == 9
    metrics = [
        sorted((one["step"], one["name"], one["value"]) for one in said(run, "metric")) for run in (whole, resumed)
    ]
    assert metrics[0] == metrics[1]


def test_the_best_step_of_a_token_student_and_of_its_twin_is_saved(
    make_run: MakeRun, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before, after steps 2 and 4, after the last, and once more where another step than the last is put back.
    planted = iter([9.0, 5.0, 3.0, 4.0, 3.0, 9.0, 2.0, 3.0, 1.0])
    measured = distill.evaluate
    monkeypatch.setattr(distill, "evaluate", lambda *a, **k: replace(measured(*a, **k), loss=next(planted)))
    run = make_run(steps=6, validate_every=2, keep="best", require=("F-DISTILL-SMOKE-001", *TWIN))
    code, text = run_here(run)
    assert code in (ExitCode.PASS, ExitCode.FAIL), text
    values = [(one["step"], one["value"], one.get("kept", False)) for one in said(run, "metric", name="val_loss")]
    student = [(0, 9.0, False), (2, 5.0, False), (4, 3.0, False), (6, 4.0, False), (4, 3.0, True)]
    assert values[:5] == student
    assert "final_loss=3.0000 (held-out, step 4)" in text
    assert said(run, "verdict", falsifier="F-DISTILL-SMOKE-001")[-1]["text"] == "val_loss 3.0000 < 9.0000 at step 4"
    record = read_run(run.path)
    loss, twin = (record.metric("val_loss", model=model) for model in ("student", "twin"))
    assert loss is not None
    assert twin is not None
    assert (loss.steps, loss.values, loss.kept, twin.kept) == ((0, 2, 4, 6), (9.0, 5.0, 3.0, 4.0), (4, 3.0), (6, 1.0))
    shown = picture(record)["held out, as saved"]
    assert (shown["student val_loss"], shown["student val_loss, of step"], shown["twin val_loss"]) == (3.0, 4, 1.0)
    assert "| val\\_loss of student | 0 | 9.0000 | 4 | 3.0000 |" in list(held_out_of(record))
    assert figures(record)[0] == Figure("held-out loss", "3.000", "from 9.000; of step 4, which is kept; twin 1.000")
    assert "from 9.000 to 3.000 (nats a token), that of step 4, which is kept; the last was 4.000;" in sentence(record)
    metrics = json.loads((run.out / "metrics.json").read_text())["models"]
    assert (metrics["student"]["kept_step"], metrics["twin"]["kept_step"]) == (4, 6), text
    assert "kept: step 4, held-out loss 3.0000; that of step 6, the last, is 4.0000" in text
    kept = load_checkpoint(run.checkpoints / "best" / "step-000004").weights
    saved = load_file(run.out / "student" / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in kept.items())
    assert [path.name for path in (run.checkpoints / "twin" / "best").iterdir()]


def test_a_run_stops_while_its_disk_still_has_room_and_goes_on_when_there_is_more(
    make_run: MakeRun, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, looks = os.statvfs, [0]

    def filling(path: Any) -> Any:
        looks[0] += 1
        found = list(real(path))
        # From the sixth step on there is less than the floor, and room for one checkpoint.
        found[4] = (100 << 30) // found[1] if looks[0] < 7 else (9 << 20) // found[1]
        return os.statvfs_result(found)

    floor = {"disk_floor_mib": 10}
    monkeypatch.setattr(os, "statvfs", filling)
    stopped = make_run(steps=12, checkpoint_every=100, endurance=floor)
    code, text = run_here(stopped)
    assert code is ExitCode.UNKNOWN, text
    assert "endurance.disk_floor_mib = 10 are to stay free; stopped after step" in text
    last = max(one["step"] for one in said(stopped, "step"))
    assert f"the last checkpoint is of step {last}" in text
    refused = make_run(steps=12, checkpoint_every=100, attempt=2, predecessor=stopped, endurance=floor)
    assert run_here(refused)[0] is ExitCode.REFUSED
    assert not refused.checkpoints.exists()
    monkeypatch.undo()
    resumed = make_run(steps=12, checkpoint_every=100, attempt=3, predecessor=refused, endurance=floor)
    _, text = run_here(resumed)
    assert f"student resumes from step {last} of {stopped.run}" in text
    assert {one["step"] for one in said(resumed, "step", model="student")} == set(range(1, 13))


def test_a_step_that_is_longer_than_the_time_to_stop_is_given_up_and_the_last_checkpoint_stands(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def endless(self: Trainer, number: int, *rest: Any) -> Any:
        if number == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(6000):
                time.sleep(0.01)
        return step(self, number, *rest)

    monkeypatch.setattr(Trainer, "step", endless)
    run = make_run(endurance={"stop_grace": 0.5})
    text = io.StringIO()
    assert execute(run.path, signals=True, text=text) is ExitCode.UNKNOWN
    end = read_events(run.events_file)[-1]
    assert (end.kind, end.fields["code"]) == ("end", 3)
    assert "neither the step under way nor its checkpoint was done within 0.4 of the 0.5 s" in end.fields["reason"]
    assert load_checkpoint(run.checkpoints / "step-000004").step == 4
    assert stop_requested() is None, "the next run of this process would stop at its first step"
