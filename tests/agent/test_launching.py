"""Launching: one supervisor and one process a run, however often and from wherever it is asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dispatch.agent import locks

from .conftest import AgentHost, Refusal, wait_for

_COUNT = "import os; fd = os.open('out/starts', os.O_WRONLY | os.O_CREAT | os.O_APPEND); os.write(fd, b'x')"
_WAIT = "import time; time.sleep(600)"


def starts(host: AgentHost, run: str) -> int:
    """How many processes have executed this run's program."""
    path = host.paths(run).out / "starts"
    return path.stat().st_size if path.exists() else 0


def test_thirty_racing_launches_start_each_run_once(host: AgentHost) -> None:
    host.call("install")
    host.installed = True
    runs = [host.python(f"{_COUNT}; import time; time.sleep(0.2)", lease=["device"]) for _ in range(2)]
    racers = [host.start("launch", {"chain": runs}) for _ in range(30)]
    answers = [host.finish(racer).document["result"] for racer in racers]
    for run in runs:
        assert host.wait(run, "finished")["outcome"] == "pass"
    assert [starts(host, run) for run in runs] == [1, 1]
    assert sum(answer["started"] for answer in answers) == 1
    supervisors = {state["supervisor_pid"] for answer in answers for state in answer["states"].values()}
    assert len(supervisors - {None}) == 1


def test_a_launch_resent_after_a_lost_reply_starts_nothing(host: AgentHost) -> None:
    run = host.python(f"{_COUNT}; {_WAIT}")
    host.call("launch", chain=[run])
    wait_for(lambda: starts(host, run))
    again = host.call("launch", chain=[run])
    assert (again["started"], again["states"][run]["state"]) == (False, "running")
    assert starts(host, run) == 1
    host.call("cancel", run=run, grace=0)


@pytest.mark.parametrize("program", ["pass", "raise SystemExit(1)", "import os; os.kill(os.getpid(), 9)"])
def test_a_finished_run_is_never_started_again(host: AgentHost, program: str) -> None:
    run = host.python(f"{_COUNT}; {program}")
    host.call("launch", chain=[run])
    before = host.wait(run, "finished")
    again = host.call("launch", chain=[run])
    assert again["started"] is False
    assert again["states"][run] == before
    assert again["blocked"] == (None if program == "pass" else run)
    assert starts(host, run) == 1


def test_a_chain_runs_in_order_and_skips_what_has_passed(host: AgentHost) -> None:
    programs = [f"{_COUNT}; open('{host.dir}/order', 'a').write('{name}')" for name in "abc"]
    first, second, third = (host.python(program) for program in programs)
    host.call("launch", chain=[first])
    host.wait(first, "finished")
    host.call("launch", chain=[first, second, third])
    assert host.wait(third, "finished")["chain"] == [second, third]
    assert (host.dir / "order").read_text() == "abc"
    assert [starts(host, run) for run in (first, second, third)] == [1, 1, 1]


def test_a_chain_stops_at_the_first_run_that_does_not_pass_and_leaves_no_half_made_run(host: AgentHost) -> None:
    good, bad = host.python("pass"), host.python("raise SystemExit(1)")
    never = [host.python(_COUNT), host.python(_COUNT)]
    host.call("launch", chain=[good, bad, *never])
    assert host.wait(bad, "finished")["outcome"] == "fail"
    # In this order: whoever has seen the failure sees no reservation behind it any more.
    assert sorted(os.listdir(host.root.runs)) == sorted([good, bad])
    assert [host.state(run)["state"] for run in never] == ["absent", "absent"]
    assert host.paths(bad).journal.read_text().count("reservation-removed") == 2


def test_a_chain_behind_an_ended_run_is_taken_away_not_started(host: AgentHost) -> None:
    bad = host.python("raise SystemExit(3)")
    host.call("launch", chain=[bad])
    host.wait(bad, "finished")
    never = host.python(_COUNT)
    answer = host.call("launch", chain=[bad, never])
    assert (answer["started"], answer["blocked"], answer["removed"]) == (False, bad, [never])
    assert answer["states"][never]["state"] == "absent"


def test_a_run_that_is_not_reserved_cannot_be_launched(host: AgentHost) -> None:
    with pytest.raises(Refusal, match="not reserved") as refusal:
        host.call("launch", chain=["data-" + "0" * 20])
    assert refusal.value.code == 2
    assert not host.dir.exists()
    run = host.python("pass")
    with pytest.raises(Refusal, match="twice"):
        host.call("launch", chain=[run, run])
    with pytest.raises(Refusal, match="0 runs"):
        host.call("launch", chain=[])


def test_a_leased_device_refuses_another_chain_with_who_holds_it(host: AgentHost) -> None:
    holder = host.python(_WAIT, lease=["device"])
    host.call("launch", chain=[holder])
    pid = host.wait(holder, "running")["pid"]
    waiting = host.python(_COUNT, lease=["device"])
    with pytest.raises(Refusal) as refusal:
        host.call("launch", chain=[waiting])
    assert (refusal.value.kind, refusal.value.code) == ("busy", 7)
    assert (refusal.value.detail["holder"]["run"], refusal.value.detail["holder"]["pid"]) == (holder, pid)
    assert holder in refusal.value.message
    assert host.state(waiting)["state"] == "reserved"
    assert host.call("probe")["lease"]["device"]["run"] == holder
    free = host.python(_COUNT)
    host.call("launch", chain=[free])
    host.wait(free, "finished")  # what needs no device does not wait for it
    host.call("cancel", run=holder, grace=0)
    assert host.call("probe")["lease"]["device"] is None
    host.call("launch", chain=[waiting])
    host.wait(waiting, "finished")


def test_a_chain_that_may_wait_is_queued_until_the_device_is_free(host: AgentHost) -> None:
    holder = host.python(_WAIT, lease=["device"])
    host.call("launch", chain=[holder])
    host.wait(holder, "running")
    waiting = host.python(_COUNT, lease=["device"])
    assert host.call("launch", chain=[waiting], wait_lease=True)["states"][waiting]["state"] == "queued"
    host.call("cancel", run=holder, grace=0)
    assert host.wait(waiting, "finished")["outcome"] == "pass"
    assert starts(host, waiting) == 1


def test_an_orphan_that_inherited_the_lease_keeps_it_until_it_dies(host: AgentHost) -> None:
    run = host.python(_WAIT, lease=["device"])
    host.call("launch", chain=[run])
    state = host.wait(run, "running")
    os.kill(state["supervisor_pid"], signal.SIGKILL)
    host.wait(run, "unsupervised")
    assert locks.held(host.root.device_lock)
    os.kill(state["pid"], signal.SIGKILL)
    host.wait(run, "lost")
    assert not locks.held(host.root.device_lock)


def test_a_run_of_another_chain_refuses_with_its_supervisor(host: AgentHost) -> None:
    shared, mine = host.python(_WAIT), host.python(_COUNT)
    host.call("launch", chain=[shared])
    pid = host.wait(shared, "running")["supervisor_pid"]
    with pytest.raises(Refusal) as refusal:
        host.call("launch", chain=[shared, mine])
    assert refusal.value.kind == "busy"
    assert str(pid) in refusal.value.message
    host.call("cancel", run=shared, grace=0)


def test_a_lost_run_is_never_started_again(host: AgentHost) -> None:
    run = host.python(f"{_COUNT}; {_WAIT}")
    host.call("launch", chain=[run])
    state = host.wait(run, "running")
    wait_for(lambda: starts(host, run))
    for pid in (state["supervisor_pid"], state["pid"]):
        os.kill(pid, signal.SIGKILL)
    host.wait(run, "lost")
    assert host.call("launch", chain=[run])["blocked"] == run
    assert starts(host, run) == 1


_KILLED_SUPERVISOR = """
import os, sys
from pathlib import Path
from dispatch.agent import job, journal, locks
from dispatch.agent.paths import Root
run, when = Root(sys.argv[1]).run(sys.argv[2]), sys.argv[3]
record = journal.record
def record_and_die(run, event, **fields):
    if event == "started" and when == "before":
        os.kill(os.getpid(), 9)
    record(run, event, **fields)
    if event == "started":
        os.kill(os.getpid(), 9)
job.journal.record = record_and_die
job.Job(run, locks.take(run.lock), None, started=print, idle=print).execute(lambda run, outcome: None)
"""


@pytest.mark.parametrize(("when", "state"), [("before", "reserved"), ("after", "lost")])
def test_a_supervisor_killed_before_the_gate_opens_has_started_nothing(host: AgentHost, when: str, state: str) -> None:
    run = host.python(_COUNT)
    command = [sys.executable, "-c", _KILLED_SUPERVISOR, str(host.dir), run, when]
    killed = subprocess.run(command, check=False, env={**host.environment, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert killed.returncode == -signal.SIGKILL
    host.wait(run, state)
    wait_for(lambda: not host.marked())
    assert starts(host, run) == 0
    if state == "reserved":
        host.call("launch", chain=[run])
        assert host.wait(run, "finished")["outcome"] == "pass"
        assert starts(host, run) == 1


def test_the_words_of_a_launch_never_appear_on_the_supervisors_command_line(host: AgentHost) -> None:
    run = host.reserve([sys.executable, "-I", "-c", _WAIT, "canary-argument"], env={"CANARY": "canary-value"})
    host.call("launch", chain=[run])
    pid = host.wait(run, "running")["supervisor_pid"]
    line = Path(f"/proc/{pid}/cmdline").read_bytes()
    assert b"canary" not in line
    assert run.encode() in line
    host.call("cancel", run=run, grace=0)
