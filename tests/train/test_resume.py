"""A run that stops, however it stops, goes on as if it had not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from latentforge.events import read_events
from latentforge.spec.run import RunDir
from latentforge.train.checkpoint import load_checkpoint, newest_checkpoint
from latentforge.verdicts import ExitCode

STEPS = 24
MakeRun = Callable[..., RunDir]
RunHere = Callable[[RunDir], tuple[ExitCode, str]]
BOTH = ("F-DISTILL-SMOKE-001", "F-DISTILL-SMOKE-002")


def losses(run: RunDir) -> dict[tuple[str, int], float]:
    return {
        (e.fields["model"], e.fields["step"]): e.fields["loss"]
        for e in read_events(run.events_file)
        if e.kind == "step"
    }


def metrics(run: RunDir) -> dict[tuple[Any, ...], float]:
    return {
        (e.fields["model"], e.fields["name"], e.fields["step"]): e.fields["value"]
        for e in read_events(run.events_file)
        if e.kind == "metric"
    }


def started(run: RunDir) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "latentforge", "run", str(run.path)]
    return subprocess.Popen(command, stdout=open(run.log_file, "ab"), stderr=subprocess.STDOUT, env={**os.environ})


def wait_for_step(run: RunDir, process: subprocess.Popen[bytes], model: str, step: int) -> None:
    """Return when the event log says that the step was made; fail where the run ends or two minutes pass first."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if run.events_file.exists() and losses(run).get((model, step)) is not None:
            return
        assert process.poll() is None, run.log_file.read_text()
        time.sleep(0.005)
    pytest.fail(f"no step {step} of the {model} within two minutes:\n{run.log_file.read_text()}")


def kill_at(run: RunDir, model: str, step: int) -> None:
    process = started(run)
    try:
        wait_for_step(run, process, model, step)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)


def test_killed_at_random_steps_and_resumed_it_has_the_losses_of_an_uninterrupted_run(
    make_run: MakeRun, run_here: RunHere
) -> None:
    where = random.Random(os.environ.get("LATENTFORGE_SEED", time.time_ns()))
    at = (where.randrange(1, STEPS), where.randrange(1, STEPS))
    print(f"killed at step {at[0]} of the student, then step {at[1]} of the twin")
    # Micro-batches of 5, 5, 5 and 1: what adds up within a step must not depend on where the run was cut.
    whole = make_run(require=BOTH, micro_batch_size=5)
    assert run_here(whole)[0] in (0, 1)

    first = make_run(attempt=2, require=BOTH, micro_batch_size=5)
    kill_at(first, "student", at[0])
    second = make_run(attempt=3, predecessor=first, require=BOTH, micro_batch_size=5)
    kill_at(second, "twin", at[1])
    third = make_run(attempt=4, predecessor=second, require=BOTH, micro_batch_size=5)
    code, text = run_here(third)

    assert losses(third) == losses(whole)
    assert metrics(third) == metrics(whole)
    assert f"student resumes from step {STEPS} of {second.run}" in text
    assert code == read_events(whole.events_file)[-1].fields["code"]
    resumed = [e.fields for e in read_events(third.events_file) if e.fields.get("name") == "resume"]
    assert resumed[0]["step"] == STEPS
    assert resumed[0]["predecessor"] == second.run


def test_a_terminated_run_writes_a_checkpoint_ends_as_unknown_and_says_so(make_run: MakeRun) -> None:
    run = make_run(checkpoint_every=1000, steps=400)
    process = started(run)
    wait_for_step(run, process, "student", 3)
    process.terminate()
    assert process.wait(60) == 3
    end = read_events(run.events_file)[-1]
    assert (end.kind, end.fields["code"]) == ("end", 3)
    done = max(step for _, step in losses(run))
    assert f"after step {done}" in end.fields["reason"]
    kept, said = newest_checkpoint(run.checkpoints)
    assert kept is not None
    assert kept.step == done
    assert said == []


def test_a_torn_checkpoint_is_skipped_and_said(make_run: MakeRun, run_here: RunHere) -> None:
    whole = make_run()
    run_here(whole)
    newest = whole.checkpoints / f"step-{STEPS:06d}"
    with open(newest / "model.safetensors", "r+b") as stream:
        stream.truncate(200)
    again = make_run(attempt=2, predecessor=whole)
    _, text = run_here(again)
    assert f"skipped: checkpoint {newest}" in text
    assert f"student resumes from step {STEPS - 4}" in text
    assert losses(again) == losses(whole)
    assert metrics(again) == metrics(whole)


def test_an_attempt_without_a_checkpoint_hands_on_to_the_one_before_it(make_run: MakeRun, run_here: RunHere) -> None:
    whole = make_run()
    run_here(whole)
    empty = make_run(attempt=2, predecessor=whole)
    third = make_run(attempt=3, predecessor=empty)
    _, text = run_here(third)
    assert f"student resumes from step {STEPS} of {whole.run}" in text


def test_a_predecessor_without_any_checkpoint_means_step_0_and_is_said(make_run: MakeRun, run_here: RunHere) -> None:
    empty = make_run()
    again = make_run(attempt=2, predecessor=empty)
    _, text = run_here(again)
    assert f"{empty.run} left no checkpoint that is whole: starting from step 0" in text
    assert ("student", 1) in losses(again)


def test_a_predecessor_that_was_asked_for_something_else_is_refused(make_run: MakeRun, run_here: RunHere) -> None:
    other = make_run(learning_rate=1e-4)
    run_here(other)
    run = make_run(attempt=2, predecessor=other)
    code, text = run_here(run)
    assert code == 2
    assert f"cannot resume {other.run}: its spec is another" in text


def test_a_checkpoint_holds_weights_moments_and_generator(make_run: MakeRun, run_here: RunHere) -> None:
    run = make_run()
    run_here(run)
    kept = load_checkpoint(run.checkpoints / f"step-{STEPS:06d}")
    assert {name.rpartition("/")[2] for name in kept.moments} == {"step", "exp_avg", "exp_avg_sq"}
    assert {name.rpartition("/")[0] for name in kept.moments} == set(kept.weights)
    assert kept.rng.cpu.numel() > 0
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [f"step-{s:06d}" for s in (STEPS - 4, STEPS)]
