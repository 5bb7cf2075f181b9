"""A step that is none: the run ends before it with a checkpoint, or leaves its batch out once, and says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from latentforge.events import read_events
from latentforge.evidence.reading import read_run
from latentforge.spec.run import RunDir
from latentforge.train import distill
from latentforge.train.checkpoint import load_checkpoint
from latentforge.train.course import Watch
from latentforge.train.loop import Trainer
from latentforge.train.reading import left_out_of
from latentforge.verdicts import ExitCode

from .test_long_runs import said

MakeRun = Callable[..., RunDir]
RunHere = Callable[[RunDir], tuple[ExitCode, str]]
ROWS = ("F-BATCH-ROWS-001",)
SKIP: dict[str, Any] = {"on_bad_step": "skip"}


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], list[int]]:
    """Multiply the losses of some steps (from 1); returns the steps that were tried, in their order."""

    def planted(factors: dict[int, float]) -> list[int]:
        monkeypatch.undo()
        tried: list[int] = []
        real, at = Trainer.pass_over, [0]

        def step(self: Trainer, number: int, *rest: Any, made: Any = Trainer.step) -> Any:
            at[0] = number + 1
            tried.append(number + 1)
            return made(self, number, *rest)

        def pass_over(self: Trainer, *rest: Any) -> Any:
            found = real(self, *rest)
            return found._replace(loss=found.loss * factors.get(at[0], 1.0))

        monkeypatch.setattr(Trainer, "step", step)
        monkeypatch.setattr(Trainer, "pass_over", pass_over)
        return tried

    return planted


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.out / "student" / "model.safetensors")


def made(run: RunDir) -> list[int]:
    series = read_run(run.path).steps_of("loss", model="student")
    assert series is not None
    return list(series.steps)


def test_a_loss_that_is_no_number_ends_the_run_with_the_checkpoint_before_it(
    make_run: MakeRun, run_here: RunHere, plant: Any
) -> None:
    plant({7: float("nan")})
    run = make_run(steps=10)
    code, text = run_here(run)
    assert code is ExitCode.FAIL, text
    assert "loss is nan at step 7; nothing was updated" in text
    kept = load_checkpoint(run.checkpoints / "step-000006")
    assert all(bool(torch.isfinite(value).all()) for value in kept.weights.values())
    assert made(run) == list(range(1, 7))


def test_its_batch_is_left_out_where_that_was_asked_and_events_and_evidence_say_so(
    make_run: MakeRun, run_here: RunHere, plant: Any
) -> None:
    tried = plant({8: float("inf")})
    run = make_run(steps=10, require=ROWS, bad=SKIP)
    code, text = run_here(run)
    assert code is ExitCode.PASS, text
    assert "warning: step 8 of the student was left out: loss is inf at step 8; nothing was updated" in text
    assert tried == list(range(1, 11))
    assert made(run) == [1, 2, 3, 4, 5, 6, 7, 9, 10]
    record = read_run(run.path)
    assert record.effective is not None
    assert record.effective["left_out.student"] == [8]
    assert (record.effective["endurance.on_bad_step"], record.differences) == ("skip", ())
    # The checkpoint that was due after it is that of the step before.
    assert (run.checkpoints / "step-000008").is_dir()
    rates = {one["step"]: one["learning_rate"] for one in said(run, "step")}
    whole = make_run(steps=10, attempt=2, require=ROWS)
    plant({})
    run_here(whole)
    assert {one["step"]: one["learning_rate"] for one in said(whole, "step")}.items() >= rates.items()


def test_a_second_one_at_the_same_place_ends_the_run(make_run: MakeRun, run_here: RunHere, plant: Any) -> None:
    plant({5: float("nan"), 7: float("nan")})
    code, text = run_here(make_run(steps=10, bad={**SKIP, "divergence_steps": 2}))
    assert code is ExitCode.FAIL, text
    assert "step 5 was left out before it: the second at one place ends the run" in text
    plant({5: float("nan"), 8: float("nan")})
    run = make_run(steps=10, attempt=2, require=ROWS, bad={**SKIP, "divergence_steps": 2})
    assert run_here(run)[0] is ExitCode.PASS
    assert made(run) == [1, 2, 3, 4, 6, 7, 9, 10]


def test_what_diverges_goes_back_leaves_out_where_it_began_and_so_does_a_resume(
    make_run: MakeRun, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**SKIP, "divergence_factor": 3.0, "divergence_steps": 3}
    spec = {"steps": 14, "checkpoint_every": 2, "require": ROWS, "bad": asked, "validate_every": 2, "keep": "best"}
    learn = distill.Trainer.step

    def poisoned(self: Trainer, number: int, *rest: Any) -> Any:
        """The update of step 8 moves the weights so far that no later loss is what it was."""
        result = learn(self, number, *rest)
        if number + 1 == 8:
            with torch.no_grad():
                for master in self.optimiser.masters.values():
                    master.add_(torch.randn(master.shape, generator=torch.Generator().manual_seed(1)), alpha=3.0)
        return result

    monkeypatch.setattr(Trainer, "step", poisoned)
    stopping = make_run(**{**spec, "bad": {**asked, "on_bad_step": "stop"}})
    code, text = run_here(stopping)
    assert code is ExitCode.FAIL, text
    assert "the loss of the student diverges: from step 9 on" in text
    assert (stopping.checkpoints / "step-000006").is_dir()  # the newest before it outlives the two after it

    run = make_run(attempt=2, **spec)
    code, text = run_here(run)
    assert code is ExitCode.PASS, text
    assert "step 8 of the student was left out: from step 9 on the loss was above 3 x" in text
    assert made(run) == [1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14]
    assert [one["step"] for one in said(run, "phase", name="rollback")] == [6]
    assert all(one["loss"] < 10 for one in said(run, "step")[-5:])

    signals = iter([None] * 11 + ["SIGTERM"])
    monkeypatch.setattr(distill, "stop_requested", lambda: next(signals, None))
    stopped = make_run(attempt=3, **spec)
    assert run_here(stopped)[0] is ExitCode.UNKNOWN
    monkeypatch.setattr(distill, "stop_requested", lambda: None)
    resumed = make_run(attempt=4, predecessor=stopped, **spec)
    code, text = run_here(resumed)
    assert code is ExitCode.PASS, text
    assert made(resumed) == made(run)
    ours, theirs = weights(resumed), weights(run)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    found = [json.loads((one.out / "metrics.json").read_text())["models"]["student"] for one in (resumed, run)]
    assert all(found[0][name] == found[1][name] for name in ("initial", "final", "kept_step"))


def test_a_resume_before_a_batch_that_was_left_out_leaves_it_out_again(
    make_run: MakeRun, run_here: RunHere, plant: Any
) -> None:
    plant({6: float("nan")})
    first = make_run(steps=8, bad=SKIP)
    run_here(first)
    for newer in ("step-000008",):
        (first.checkpoints / newer / "state.json").unlink()
    tried = plant({})
    second = make_run(steps=8, attempt=2, predecessor=first, bad=SKIP)
    _, text = run_here(second)
    assert tried == [7, 8], text
    assert list(left_out_of(read_events(second.events_file), "student")) == [6]


def test_a_loss_diverges_above_the_factor_times_the_median_for_so_many_steps_in_a_row() -> None:
    watch = Watch(2.0, 3)
    told = [watch.feed(step, loss) for step, loss in enumerate([1, 1, 1, 3, 3, 1, 3, 3, 3])]
    assert told == [False] * 8 + [True]
    assert watch.onset == 6
    assert not any(Watch(None, 1).feed(step, 10.0**step) for step in range(9))
    below = Watch(2.0, 2)
    assert not any(below.feed(step, loss) for step, loss in enumerate([-1.0, -1.0, -1.0, 5.0, 6.0, 7.0]))
