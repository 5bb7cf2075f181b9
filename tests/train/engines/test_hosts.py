"""A run over two hosts is the run that one makes; whatever becomes of one of them, the other ends within its time."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from latentforge.events import read_events
from latentforge.spec.hosts import Hosts, following
from latentforge.spec.run import LaunchRecord, RunDir, write_record
from latentforge.train import effective
from latentforge.verdicts import ExitCode

MakeRun = Callable[..., RunDir]
RunHere = Callable[[RunDir], tuple[ExitCode, str]]
Start = Callable[[RunDir], "subprocess.Popen[bytes]"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def spread(leader: RunDir, other: Path, **changed: Any) -> RunDir:
    """Make ``leader`` a run over two hosts; returns the run that follows it, below another state root."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    world = {"hosts": ["a", "b"], "address": "127.0.0.1", "port": port, "interface": "lo", **changed}
    hosts = [Hosts.model_validate({"index": index, **world}) for index in (0, 1)]
    launch = replace(leader.load_launch(), world=hosts[0].as_json())
    write_record(leader.launch_file, launch.as_json())
    identity = following(leader.load_identity(), 1)
    (other / "runs").mkdir(parents=True, exist_ok=True)
    own = LaunchRecord(identity.run_id, launch.kin, {}, endurance=launch.endurance, world=hosts[1].as_json())
    return RunDir.create(other / "runs", identity, own)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a run as a host's supervisor does; what a failed test leaves is killed, and its processes with it."""
    with ExitStack() as stack:

        def started(run: RunDir) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "latentforge", "run", str(run.path)]
            with open(run.log_file, "ab") as log:
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ})
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        yield started


def steps_of(run: RunDir) -> dict[int, dict[str, Any]]:
    return {e.fields["step"]: e.fields for e in read_events(run.events_file) if e.kind == "step"}


def said(*runs: RunDir) -> str:
    return "\n".join(f"--- {run.path}\n{run.log_file.read_text()}" for run in runs)


def wait_for(there: Callable[[], bool], processes: list[subprocess.Popen[bytes]], *runs: RunDir) -> None:
    while not there():
        assert all(one.poll() is None for one in processes), said(*runs)
        time.sleep(0.01)


def processes_of(run: RunDir) -> list[int]:
    found = re.search(r"^1 process: (\d+)$", run.log_file.read_text(), re.M)
    assert found is not None, said(run)
    return [int(found[1])]


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


WANTED: dict[str, Any] = {
    "steps": 12,
    "batch_size": 5,  # rows that two cannot share evenly
    "micro_batch_size": 1,
    "distributed": "fsdp2",
    "validate_every": 4,
    "keep": "best",
    "checkpoint_every": 4,
}


def at_step(run: RunDir, step: int) -> Callable[[], bool]:
    return lambda: run.events_file.exists() and step in steps_of(run)


def test_two_hosts_make_the_run_of_one_stop_together_and_go_on(
    make_run: MakeRun, run_here: RunHere, start: Start, tmp_path: Path
) -> None:
    whole, other = make_run(**{**WANTED, "distributed": "none"}), tmp_path / "b"
    assert run_here(whole)[0] == 0

    # Told to stop on the host that follows, both end after the same step.
    first = make_run(**WANTED, attempt=2)
    stopped = spread(first, other)
    both = [start(first), start(stopped)]
    wait_for(at_step(first, 5), both, first, stopped)
    both[1].send_signal(signal.SIGTERM)
    assert [one.wait() for one in both] == [3, 3], said(first, stopped)
    done = max(steps_of(first))
    reason = read_events(first.events_file)[-1].fields["reason"]
    assert reason == f"interrupted by SIGTERM after step {done} of the student; checkpoint written"
    assert reason in read_events(stopped.events_file)[-1].fields["reason"]
    assert not any(alive(pid) for run in (first, stopped) for pid in processes_of(run))

    second = make_run(**WANTED, attempt=3, predecessor=first)
    follower = spread(second, other)
    follows = start(follower)
    code, text = run_here(second)
    assert (code, follows.wait()) == (0, 0), text + said(follower)
    assert f"student resumes from step {done} of {first.run}" in text
    # What the attempt before it mirrored is not moved again: the checkpoint is, and what was said since.
    moved = re.search(r"^host b: ([0-9]+) of ([0-9]+) files moved", text, re.M)
    assert moved is not None
    assert int(moved[1]) < int(moved[2]) / 2
    ours, theirs = steps_of(second), steps_of(whole)
    assert ours.keys() == theirs.keys()
    assert [ours[step]["loss"] for step in theirs] == pytest.approx([one["loss"] for one in theirs.values()], rel=1e-6)
    kept = [load_file(run.out / "student" / "model.safetensors") for run in (whole, second)]
    assert max(float((kept[0][name] - kept[1][name]).abs().max()) for name in kept[0]) < 1e-6
    known = effective.read(second)["world"]
    assert known["ranks"] == {"a": [0], "b": [1]}
    assert (known["address"], known["interface"], known["others"][0]["host"]) == ("127.0.0.1", "lo", "b")
    made = effective.read(second)["effective"]
    assert (made["distill"]["processes"], made["engine"]["processes"]) == (1, 2)
    # The follower makes nothing.
    assert not follower.out.exists()
    assert {e.kind for e in read_events(follower.events_file)} <= {"phase", "memory", "end"}


@pytest.mark.soak
@pytest.mark.fault(row=43)
def test_a_host_that_falls_silent_ends_the_other_within_the_deadline_and_itself_when_it_wakes(
    make_run: MakeRun, start: Start, tmp_path: Path
) -> None:
    leader = make_run(**WANTED)
    follower = spread(leader, tmp_path / "b", deadline_seconds=4.0)
    both = [start(leader), start(follower)]
    wait_for(at_step(leader, 5), both, leader, follower)
    there = processes_of(follower)
    # Nothing closes its connections: the kernel goes on answering for it.
    both[1].send_signal(signal.SIGSTOP)
    for pid in there:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    assert both[0].wait() == 5, said(leader, follower)
    assert time.monotonic() - began < 4.0 + 60.0
    end = read_events(leader.events_file)[-1]
    assert re.fullmatch(r"host b was not heard for 4[.0-9]* s; the processes here were ended", end.fields["reason"])
    assert "  next: see what became of it, then go on" in said(leader)
    assert not any(alive(pid) for pid in processes_of(leader))
    both[1].send_signal(signal.SIGCONT)  # its process stays stopped, and has to be killed
    assert both[1].wait() == 5, said(leader, follower)
    reason = read_events(follower.events_file)[-1].fields["reason"]
    assert reason == f"host a ended with exit code 5 (crashed): {end.fields['reason']}"
    assert not any(alive(pid) for pid in there)


@pytest.mark.soak
@pytest.mark.fault(row=43)
def test_when_the_leaders_run_is_killed_the_follower_ends_at_once_and_no_process_is_left_on_either(
    make_run: MakeRun, start: Start, tmp_path: Path
) -> None:
    leader = make_run(**WANTED)
    follower = spread(leader, tmp_path / "b")
    both = [start(leader), start(follower)]
    wait_for(at_step(leader, 5), both, leader, follower)
    pids = [pid for run in (leader, follower) for pid in processes_of(run)]
    both[0].kill()
    began = time.monotonic()
    assert both[1].wait() == 5, said(leader, follower)
    assert time.monotonic() - began < 30.0, "its deadline was waited for"
    reason = read_events(follower.events_file)[-1].fields["reason"]
    assert reason == "host a closed its connection: its run ended, or was killed; the processes here were ended"
    assert not any(alive(pid) for pid in pids)
