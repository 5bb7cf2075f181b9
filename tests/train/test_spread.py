"""A run on several processes is the run that one makes: its steps, what it keeps, how it is stopped and goes on."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from latentforge.events import read_events
from latentforge.spec.run import RunDir
from latentforge.train import effective
from latentforge.train.engines import beating
from latentforge.train.engines.launching import GRACE_SECONDS
from latentforge.train.run import execute
from latentforge.verdicts import ExitCode

MakeRun = Callable[..., RunDir]
RunHere = Callable[[RunDir], tuple[ExitCode, str]]
pytestmark = pytest.mark.slow
STEPS = 40


def steps_of(run: RunDir) -> dict[int, dict[str, Any]]:
    return {e.fields["step"]: e.fields for e in read_events(run.events_file) if e.kind == "step"}


def verdicts_of(run: RunDir) -> dict[str, str]:
    return {e.fields["falsifier"]: e.fields["outcome"] for e in read_events(run.events_file) if e.kind == "verdict"}


def started(run: RunDir) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "latentforge", "run", str(run.path)]
    with open(run.log_file, "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ})


def wait_for_step(run: RunDir, process: subprocess.Popen[bytes], step: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if run.events_file.exists() and step in steps_of(run):
            return
        assert process.poll() is None, run.log_file.read_text()
        time.sleep(0.005)
    pytest.fail(f"no step {step} within four minutes:\n{run.log_file.read_text()}")


def processes_of(run: RunDir) -> list[int]:
    found = re.search(r"^2 processes: (\d+), (\d+)$", run.log_file.read_text(), re.M)
    assert found is not None
    return [int(pid) for pid in found.groups()]


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_two_processes_make_the_run_that_one_makes(make_run: MakeRun, run_here: RunHere) -> None:
    # Rows that cannot be shared out evenly, five passes of one process and three of the other.
    wanted = {"steps": 6, "batch_size": 5, "micro_batch_size": 1}
    alone, together = make_run(**wanted), make_run(**wanted, distributed="ddp", processes=2)
    assert run_here(alone)[0] == 0
    code, text = run_here(together)
    assert code == 0, text
    ours, theirs = steps_of(together), steps_of(alone)
    assert ours.keys() == theirs.keys()
    for step, said in theirs.items():
        for name in ("loss", "grad_norm", "kd", "ce"):
            assert ours[step][name] == pytest.approx(said[name], rel=1e-6), (step, name)
        same = ("rows", "sequences", "denominator", "batch_sha256", "learning_rate", "target_rows", "kd_rows")
        assert [ours[step][name] for name in same] == [said[name] for name in same]
    assert verdicts_of(together) == verdicts_of(alone)
    kept = [load_file(run.checkpoints / "step-000006" / "model.safetensors") for run in (alone, together)]
    assert kept[0].keys() == kept[1].keys()
    assert max(float((kept[0][name] - kept[1][name]).abs().max()) for name in kept[0]) < 1e-5
    said = effective.read(together)
    assert (said["effective"]["distill"]["distributed"], said["effective"]["distill"]["processes"]) == ("ddp", 2)
    assert said["effective"]["engine"]["wrapper"] == "DistributedDataParallel"
    held, terms = said["memory"], said["memory"]["terms"]
    assert held["allocator_cap_bytes"] is effective.read(alone)["memory"]["allocator_cap_bytes"] is None
    assert 0 < held["measured_bytes"] <= 1.15 * held["planned_own_bytes"]
    assert terms["planned_buckets"] == terms["planned_student"] > 0  # of fp32, in both processes
    assert [event.seq for event in read_events(together.events_file)] == list(
        range(len(read_events(together.events_file)))
    )


def test_a_run_is_stopped_and_killed_and_goes_on_under_other_engines(make_run: MakeRun, run_here: RunHere) -> None:
    whole = make_run(steps=STEPS)
    assert run_here(whole)[0] == 0

    first = make_run(attempt=2, steps=STEPS, distributed="fsdp2", processes=2)
    process = started(first)
    wait_for_step(first, process, 3)
    process.terminate()
    assert process.wait(120) == 3, first.log_file.read_text()
    end = read_events(first.events_file)[-1]
    done = max(steps_of(first))
    assert (end.kind, end.fields["code"]) == ("end", 3)
    assert f"interrupted by SIGTERM after step {done} of the student; checkpoint written" in end.fields["reason"]
    assert all(gone(pid) for pid in processes_of(first))

    second = make_run(attempt=3, predecessor=first, steps=STEPS, distributed="deepspeed-zero3", processes=2)
    killed: list[int] = []

    def kill() -> None:
        # The next checkpoint is whole once the step behind it is made.
        while not (second.events_file.exists() and done - done % 4 + 5 in steps_of(second)):
            if log.closed:
                return
            time.sleep(0.005)
        killed.extend(processes_of(second))
        os.kill(killed[1], signal.SIGKILL)

    watcher = threading.Thread(target=kill)
    with open(second.log_file, "w", buffering=1) as log:
        watcher.start()
        assert execute(second.path, text=log) == 5, second.log_file.read_text()
    watcher.join()
    end = read_events(second.events_file)[-1]
    assert end.fields["reason"] == f"process 1 of 2 (pid {killed[1]}) was killed by SIGKILL; the others were ended"
    assert "  next: " in second.log_file.read_text()
    assert gone(killed[0])

    third = make_run(attempt=4, predecessor=second, steps=STEPS)
    code, text = run_here(third)
    assert code == 0, text
    assert f"of {second.run}" in text
    ours, theirs = steps_of(third), steps_of(whole)
    assert ours.keys() == theirs.keys()
    # What rounding differs by grows from step to step.
    assert all(ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-4) for step in theirs)
    assert all(ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-6) for step in range(1, 4))


def test_a_process_that_crashes_ends_the_run_with_its_own_words(make_run: MakeRun, run_here: RunHere) -> None:
    run = make_run(steps=4, distributed="ddp", processes=2)
    (run.out / "checkpoints").parent.mkdir(exist_ok=True)
    (run.out / "checkpoints").write_text("no folder")
    code, text = run_here(run)
    assert code == 1
    assert re.search(r"^error: checkpoint .*step-000004 could not be written: .*(exists|Not a directory)", text, re.M)
    assert "  next: make room or mend the disk" in text
    assert read_events(run.events_file)[-1].kind == "end"


@pytest.mark.soak
def test_a_process_that_is_stopped_by_a_signal_ends_the_run_within_the_deadline(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = io.StringIO()
    run = make_run(steps=4000, distributed="ddp", processes=2)
    stopped: list[float] = []

    def stop() -> None:
        while not (run.events_file.exists() and 3 in steps_of(run)):
            time.sleep(0.05)
        found = re.search(r"^2 processes: \d+, (\d+)$", text.getvalue(), re.M)
        assert found is not None
        # Only now: what is loaded at start may hold a process for longer on a busy host.
        monkeypatch.setattr(beating, "HUNG_SECONDS", 10.0)
        os.kill(int(found[1]), signal.SIGSTOP)
        stopped.append(time.monotonic())

    watcher = threading.Thread(target=stop)
    watcher.start()
    assert execute(run.path, text=text) == 5
    watcher.join()
    assert time.monotonic() - stopped[0] < 10.0 + GRACE_SECONDS + 20.0
    assert re.search(r"process 1 of 2 \(pid \d+\) gave no sign of life .* its state was T \(stopped\)", text.getvalue())
    assert read_events(run.events_file)[-1].fields["code"] == 5
