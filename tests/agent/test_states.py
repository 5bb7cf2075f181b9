"""States are derived when they are asked for, and only a valid exit record turns a run green."""

from __future__ import annotations

import os
import signal

import pytest

from dispatch.agent import exitrec, locks, state

from .conftest import AgentHost, wait_for

_WAIT = "import time; time.sleep(600)"


def test_what_was_never_reserved_is_absent(host: AgentHost) -> None:
    run = "data-" + "0" * 20
    assert host.call("status", runs=[run])[run]["state"] == "absent"


def test_a_job_whose_supervisor_was_killed_goes_on_unsupervised_and_is_lost_when_it_ends(host: AgentHost) -> None:
    run = host.python("import time, os\nwhile not os.path.exists('out/end'): time.sleep(0.01)")
    host.call("launch", chain=[run])
    running = host.wait(run, "running")
    os.kill(running["supervisor_pid"], signal.SIGKILL)
    orphan = host.wait(run, "unsupervised")
    assert orphan["pid"] == running["pid"]
    assert orphan["outcome"] is None
    (host.paths(run).out / "end").touch()
    lost = host.wait(run, "lost")
    assert (lost["outcome"], lost["exit"], lost["code"]) == ("unknown", 3, None)


def test_runs_behind_a_killed_supervisor_are_reservations_again(host: AgentHost) -> None:
    first, second = host.python(_WAIT), host.python("pass")
    host.call("launch", chain=[first, second])
    supervisor = host.wait(first, "running")["supervisor_pid"]
    assert host.state(second)["state"] == "queued"
    os.kill(supervisor, signal.SIGKILL)
    host.wait(first, "unsupervised")
    host.wait(second, "reserved")
    host.call("cancel", run=first, grace=0)
    answer = host.call("launch", chain=[second])
    assert answer["started"] is True
    host.wait(second, "finished")


def test_a_restart_of_the_host_interrupts_what_ran_and_keeps_what_had_ended(host: AgentHost) -> None:
    ended, running, reserved = host.python("pass"), host.python(_WAIT), host.python("pass")
    host.call("launch", chain=[ended])
    host.wait(ended, "finished")
    host.call("launch", chain=[running])
    host.wait(running, "running")
    seen = {run: state.derive(host.paths(run), boot="another-boot") for run in (ended, running, reserved)}
    assert [seen[run]["state"] for run in (ended, running, reserved)] == ["finished", "interrupted", "reserved"]
    assert (seen[running]["outcome"], seen[running]["exit"]) == ("unknown", 3)
    host.call("cancel", run=running, grace=0)


def test_an_interrupted_run_blocks_its_chain(host: AgentHost) -> None:
    run, behind = host.python(_WAIT), host.python("pass")
    host.call("launch", chain=[run])
    alive = host.wait(run, "running")
    for pid in (alive["supervisor_pid"], alive["pid"]):
        os.kill(pid, signal.SIGKILL)
    host.wait(run, "lost")
    journal = host.paths(run).journal
    journal.write_text(journal.read_text().replace('"boot_id":"', '"boot_id":"earlier-'))
    assert host.state(run)["state"] == "interrupted"
    answer = host.call("launch", chain=[run, behind])
    assert (answer["blocked"], answer["removed"]) == (run, [behind])


@pytest.mark.parametrize("flip", [0, 8, 12, 60, 4095])
def test_a_damaged_exit_record_is_not_green(host: AgentHost, flip: int) -> None:
    ended = host.ran("pass")
    path = host.paths(ended["run"]).exit
    data = bytearray(path.read_bytes())
    data[flip] ^= 1
    path.write_bytes(data)
    damaged = host.state(ended["run"])
    assert (damaged["state"], damaged["outcome"], damaged["exit"]) == ("lost", "unknown", 3)


def test_the_exit_record_of_another_run_is_not_green(host: AgentHost) -> None:
    passed, other = host.ran("pass"), host.ran("raise SystemExit(1)")
    path = host.paths(other["run"]).exit
    path.write_bytes(host.paths(passed["run"]).exit.read_bytes())
    assert host.state(other["run"])["state"] == "lost"


def test_a_run_whose_lock_is_still_held_after_its_record_is_finishing(host: AgentHost) -> None:
    ended = host.ran("pass")
    fd = locks.take(host.paths(ended["run"]).lock)
    assert fd is not None
    assert host.state(ended["run"])["state"] == "finishing"
    locks.release(fd)
    assert host.state(ended["run"])["state"] == "finished"


def test_an_outcome_that_nobody_knows_is_unknown_never_pass() -> None:
    assert state.exit_code(None) == 3
    assert state.exit_code("splendid") == 3
    assert state.outcome_of(None, None) == "crashed"
    assert state.outcome_of(0, 9) == "killed"


def test_testing_a_lock_never_keeps_its_taker_out(host: AgentHost) -> None:
    run = host.python("pass")
    path = host.paths(run).lock
    reader = os.open(path, os.O_RDONLY)
    import fcntl

    fcntl.flock(reader, fcntl.LOCK_SH)
    assert locks.take(path, patience=0.05) is None
    fcntl.flock(reader, fcntl.LOCK_UN)
    taken = wait_for(lambda: locks.take(path))
    assert locks.held(path)
    locks.release(taken)
    os.close(reader)


def test_a_record_written_for_a_full_disk_carries_its_reason(host: AgentHost) -> None:
    longest = {"run": "x" * 53, "reason": "\U0001f642" * 300, "survivors": [4194304] * 20, "oom_evidence": "x" * 80}
    longest |= {"cancel": {"by": "é" * 100}, "artifacts": "f" * 64, "boot_id": "b" * 36}
    assert len(exitrec.encode(longest)) == exitrec.SIZE
