"""Cancel ends the whole tree of a run and nobody else's, proves it, and may be repeated."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from dispatch.agent import cancelling, exitrec, journal, locks
from dispatch.agent.paths import RunPaths
from dispatch.agent.processes import MARK, Process, look, send

from .conftest import AgentHost, wait_for

_WAIT = "import time; open('out/ready', 'w').close(); time.sleep(600)"
_STUBBORN = """
import os, signal, time
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
def note(name):
    with open("out/" + name, "w") as file: file.write(str(os.getpid()))
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(3, 1024)
        if os.fork() == 0: note("deep")
        else: note("orphan")
        time.sleep(600)
    os._exit(0)
os.wait()
if os.fork() == 0: note("child")
else:
    while len(os.listdir("out")) < 3: time.sleep(0.005)
    note("ready")
time.sleep(600)
"""


def _ready(host: AgentHost, run: str) -> None:
    wait_for(lambda: (host.paths(run).out / "ready").exists())


def test_a_cancelled_run_ends_by_its_own_will_within_its_grace(host: AgentHost) -> None:
    program = (
        "import signal, sys\nsignal.signal(15, lambda *_: sys.exit(0))\nopen('out/ready', 'w').close()\nsignal.pause()"
    )
    run = host.python(program)
    host.call("launch", chain=[run])
    _ready(host, run)
    answer = host.call("cancel", run=run, grace=20, by="a test")
    assert (answer["did"], answer["forced"], answer["survivors"]) == ("ended", False, [])
    state = answer["state"]
    # It exited with 0, and is not green for that.
    assert (state["state"], state["outcome"], state["code"], state["exit"]) == ("finished", "cancelled", 0, 5)
    events = [event["event"] for event in journal.read(host.paths(run)).events]
    assert events == ["launching", "started", "cancel-requested", "ended", "cancelled"]


def test_a_tree_that_ignores_everything_is_gone_after_the_grace(host: AgentHost) -> None:
    run = host.python(_STUBBORN, lease=["device"])
    host.call("launch", chain=[run])
    _ready(host, run)
    pids = [int(path.read_text()) for path in host.paths(run).out.iterdir()]
    assert len(pids) == 4
    begun = time.monotonic()
    answer = host.call("cancel", run=run, grace=0.5)
    assert 0.5 <= time.monotonic() - begun < 10
    assert (answer["forced"], answer["survivors"]) == (True, [])
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not locks.held(host.root.device_lock), "the next one may be launched"
    assert (answer["state"]["outcome"], answer["state"]["signal"]) == ("cancelled", signal.SIGKILL)


def test_a_stopped_process_is_woken_to_hear_its_end(host: AgentHost) -> None:
    run = host.python(_WAIT)
    host.call("launch", chain=[run])
    _ready(host, run)
    os.kill(host.state(run)["pid"], signal.SIGSTOP)
    answer = host.call("cancel", run=run, grace=20)
    assert (answer["forced"], answer["state"]["signal"]) == (False, signal.SIGTERM)


def test_cancelling_again_is_harmless(host: AgentHost) -> None:
    run = host.python(_WAIT)
    host.call("launch", chain=[run])
    _ready(host, run)
    first = host.call("cancel", run=run, grace=5)
    second = host.call("cancel", run=run, grace=5)
    assert second["did"] == "nothing"
    assert second["state"] == first["state"]
    assert host.call("cancel", run="data-" + "0" * 20)["state"]["state"] == "absent"


def test_two_cancels_at_once_agree(host: AgentHost) -> None:
    run = host.python(_STUBBORN)
    host.call("launch", chain=[run])
    _ready(host, run)
    both = [host.start("cancel", {"run": run, "grace": 0.2}) for _ in range(2)]
    answers = [host.finish(process).document["result"] for process in both]
    assert {answer["state"]["outcome"] for answer in answers} == {"cancelled"}


@pytest.mark.parametrize("program", ["pass", "raise SystemExit(1)"])
def test_a_finished_run_keeps_its_outcome(host: AgentHost, program: str) -> None:
    before = host.ran(program)
    assert host.call("cancel", run=before["run"])["state"] == before


def test_a_reservation_that_is_cancelled_is_gone(host: AgentHost) -> None:
    run = host.python("pass")
    answer = host.call("cancel", run=run)
    assert (answer["did"], answer["state"]["state"]) == ("removed", "absent")
    assert os.listdir(host.root.runs) == []


def test_cancelling_a_waiting_run_takes_it_and_what_follows_off_the_chain(host: AgentHost) -> None:
    first, second, third = (
        host.python("import os, time\nwhile not os.path.exists('out/end'): time.sleep(0.005)"),
        host.python("pass"),
        host.python("pass"),
    )
    host.call("launch", chain=[first, second, third])
    host.wait(first, "running")
    answer = host.call("cancel", run=second)
    assert (answer["did"], answer["state"]["state"]) == ("removed", "absent")
    assert host.state(third)["state"] == "absent"
    (host.paths(first).out / "end").touch()
    assert host.wait(first, "finished")["outcome"] == "pass"
    assert os.listdir(host.root.runs) == [first]


def test_cancelling_the_running_one_stops_its_chain(host: AgentHost) -> None:
    first, second = host.python(_WAIT), host.python("pass")
    host.call("launch", chain=[first, second])
    _ready(host, first)
    assert host.call("cancel", run=first, grace=5)["state"]["outcome"] == "cancelled"
    assert os.listdir(host.root.runs) == [first]


def test_a_run_queued_for_the_device_can_be_cancelled(host: AgentHost) -> None:
    holder, waiting = host.python(_WAIT, lease=["device"]), host.python("pass", lease=["device"])
    host.call("launch", chain=[holder])
    host.call("launch", chain=[waiting], wait_lease=True)
    assert host.call("cancel", run=waiting)["state"]["state"] == "absent"
    assert host.state(holder)["state"] == "running"
    host.call("cancel", run=holder, grace=0)


@pytest.mark.parametrize("gone_before", ["the request is written", "it is journalled"])
def test_a_queued_run_that_is_dropped_while_it_is_being_cancelled_is_cancelled(
    host: AgentHost, monkeypatch: pytest.MonkeyPatch, gone_before: str
) -> None:
    holder, waiting = host.python(_WAIT, lease=["device"]), host.python("pass", lease=["device"])
    host.call("launch", chain=[holder])
    host.call("launch", chain=[waiting], wait_lease=True)
    run = host.paths(waiting)
    write, record = cancelling.write_json, journal.record

    def dropped() -> bool:
        return not run.dir.exists()

    def written(path: Path, document: dict[str, Any]) -> bytes:
        if gone_before == "the request is written":
            write(path, document)  # another laptop's request, which the supervisor follows at once
            wait_for(dropped)
        return write(path, document)

    def recorded(paths: RunPaths, event: str, **fields: Any) -> dict[str, Any]:
        wait_for(dropped)
        return record(paths, event, **fields)

    monkeypatch.setattr(cancelling, "write_json", written)
    monkeypatch.setattr(journal, "record", recorded)
    answer = cancelling.cancel(run, 5, "a test")
    assert (answer["did"], answer["state"]["state"]) == ("removed", "absent")
    monkeypatch.undo()
    host.call("cancel", run=holder, grace=0)


def test_an_unsupervised_tree_is_ended_and_recorded_as_cancelled(host: AgentHost) -> None:
    run = host.python(_WAIT)
    host.call("launch", chain=[run])
    _ready(host, run)
    state = host.state(run)
    os.kill(state["supervisor_pid"], signal.SIGKILL)
    host.wait(run, "unsupervised")
    answer = host.call("cancel", run=run, grace=5)
    assert (answer["state"]["state"], answer["state"]["outcome"], answer["state"]["code"]) == (
        "finished",
        "cancelled",
        None,
    )
    assert "nobody saw" in answer["state"]["reason"]


_ORPHANING = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        with open("out/orphan", "w") as file: file.write(str(os.getpid()))
        time.sleep(600)
    os._exit(0)
os.wait()
while not os.path.exists("out/orphan"): time.sleep(0.005)
open("out/ready", "w").close()
"""


@pytest.mark.parametrize("leader_lives", [True, False])
def test_an_orphan_of_an_unsupervised_run_is_found_by_the_lock_that_it_inherited(
    host: AgentHost, leader_lives: bool
) -> None:
    run = host.python(_ORPHANING + ("time.sleep(600)" if leader_lives else "time.sleep(0.3)"))
    host.call("launch", chain=[run])
    os.kill(host.wait(run, "running")["supervisor_pid"], signal.SIGKILL)
    _ready(host, run)
    host.wait(run, "unsupervised")
    orphan = int((host.paths(run).out / "orphan").read_text())
    if not leader_lives:
        wait_for(lambda: not Path(f"/proc/{host.state(run)['pid']}").exists())
        assert host.state(run)["state"] == "unsupervised"
    # Somebody who only looks at the lock is nobody's business.
    onlooker = subprocess.Popen(["/bin/sleep", "600"], stdin=host.paths(run).lock.open("rb"))
    answer = host.call("cancel", run=run, grace=5)
    assert answer["survivors"] == []
    assert not Path(f"/proc/{orphan}").exists() or look(orphan).state == "Z"  # type: ignore[union-attr]
    assert answer["state"]["outcome"] == "cancelled"
    assert onlooker.poll() is None
    onlooker.kill()
    onlooker.wait()


def test_other_runs_of_the_same_host_are_left_alone(host: AgentHost) -> None:
    mine, other = host.python(_WAIT), host.python(_WAIT)
    host.call("launch", chain=[mine])
    host.call("launch", chain=[other])
    _ready(host, mine)
    _ready(host, other)
    host.call("cancel", run=mine, grace=0)
    assert host.state(other)["state"] == "running"
    host.call("cancel", run=other, grace=0)


_RUNNING_AWAY = """
import os, time
if os.fork() == 0:
    os.setsid()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if os.fork(): os._exit(0)
    os._exit(0)
open("out/ready", "w").close()
time.sleep(600)
"""


def test_what_forks_and_dies_at_once_never_outruns_a_cancel(host: AgentHost) -> None:
    run = host.python(_RUNNING_AWAY)
    host.call("launch", chain=[run])
    _ready(host, run)
    answer = host.call("cancel", run=run, grace=0)
    assert (answer["state"]["state"], answer["survivors"]) == ("finished", [])
    # A look at the table can miss it, the lock that it inherited cannot.
    assert not locks.held(host.paths(run).lock)
    wait_for(lambda: not host.marked(), describe=host.marked)  # the supervisor itself goes last


# One has let go of every descriptor, one calls itself as our own processes do; nobody of ours is their parent.
_HIDING = """
import os, time
def orphan(name, hide):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            hide()
            fd = os.open("out/" + name, os.O_CREAT | os.O_WRONLY)
            os.write(fd, str(os.getpid()).encode())
            os.close(fd)
            time.sleep(600)
        os._exit(0)
    os.wait()
def take_name():
    with open("/proc/self/comm", "w") as file: file.write("lf-supervisor")
orphan("closed", lambda: os.closerange(0, 4096))
orphan("named", take_name)
while len(os.listdir("out")) < 2: time.sleep(0.005)
open("out/ready", "w").close()
"""


@pytest.mark.parametrize("leader_lives", [True, False])
def test_an_orphan_of_an_unsupervised_run_that_hides_is_found_by_the_mark_of_its_start(
    host: AgentHost, leader_lives: bool
) -> None:
    run = host.python(
        _HIDING + ("time.sleep(600)" if leader_lives else "while not os.path.exists('end'): time.sleep(0.01)")
    )
    host.call("launch", chain=[run])
    os.kill(host.wait(run, "running")["supervisor_pid"], signal.SIGKILL)
    _ready(host, run)
    host.wait(run, "unsupervised")
    if not leader_lives:
        leader = host.state(run)["pid"]
        (host.paths(run).dir / "end").touch()
        wait_for(lambda: (seen := look(leader)) is None or not seen.alive, 60)
    answer = host.call("cancel", run=run, grace=0)
    assert (answer["survivors"], answer["state"]["outcome"]) == ([], "cancelled")
    wait_for(lambda: not host.marked(), describe=host.marked)  # the supervisor itself goes last


def test_what_outlived_a_finished_run_is_ended_by_a_cancel_and_its_outcome_stays(host: AgentHost) -> None:
    state = host.ran("pass")
    mark = journal.read(host.paths(state["run"])).started["mark"]  # type: ignore[index]
    left = subprocess.Popen(["/bin/sleep", "600"], env={MARK: mark})
    stranger = subprocess.Popen(["/bin/sleep", "600"], env={MARK: mark[:-1]})
    wait_for(lambda: Path(f"/proc/{left.pid}/cmdline").read_bytes().startswith(b"/bin/sleep"))
    answer = host.call("cancel", run=state["run"], grace=5)
    assert (answer["did"], answer["survivors"], answer["state"]["outcome"]) == ("ended", [], "pass")
    assert left.wait(10) == -signal.SIGTERM
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_a_supervisor_that_was_stopped_is_woken_to_record_the_end(host: AgentHost) -> None:
    run = host.python(_WAIT)
    host.call("launch", chain=[run])
    _ready(host, run)
    os.kill(host.state(run)["supervisor_pid"], signal.SIGSTOP)
    answer = host.call("cancel", run=run, grace=5)
    assert (answer["state"]["state"], answer["state"]["outcome"], answer["survivors"]) == ("finished", "cancelled", [])


def test_a_process_that_may_not_be_signalled_is_left_not_stumbled_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(fd: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    me = look(os.getpid())
    assert me is not None
    monkeypatch.setattr(signal, "pidfd_send_signal", refused)
    assert send(me, 0) is False


@pytest.mark.soak
@pytest.mark.parametrize("leader_stays", [True, False])
def test_another_users_process_in_a_run_is_named_as_a_survivor_and_the_end_is_recorded(
    host: AgentHost, leader_stays: bool
) -> None:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("it takes root and setpriv to become another user, and to lose the power over others")
    host.prefix = ["setpriv", "--bounding-set=-kill", "--inh-caps=-kill"]
    program = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setresuid(65534, 65534, 65534)\n"
        "    os.write(1, b'another\\n')\n"
        "    time.sleep(600)\n"
        "while not os.path.getsize('launch.log'): time.sleep(0.005)\n"
        "open('out/ready', 'w').close()\n"
    )
    run = host.python(program + ("time.sleep(600)" if leader_stays else ""))
    host.call("launch", chain=[run])
    _ready(host, run)
    (other,) = (pid for pid in host.marked() if os.stat(f"/proc/{pid}").st_uid == 65534)
    if leader_stays:
        assert host.call("cancel", run=run, grace=0)["survivors"] == [other]
    state = host.wait(run, "finishing", seconds=40)
    assert state["outcome"] == ("cancelled" if leader_stays else "pass")
    assert exitrec.read(host.paths(run).exit)["survivors"] == [other]  # type: ignore[index]
    os.kill(other, signal.SIGKILL)
    host.wait(run, "finished")


def test_a_reused_pid_is_never_signalled() -> None:
    me = look(os.getpid())
    assert me is not None
    earlier = Process(me.pid, me.state, me.parent, me.group, me.session, me.ticks - 1)
    assert send(earlier, signal.SIGKILL) is False
    assert send(me, 0) is True


def test_without_a_grace_of_its_own_a_cancel_waits_as_long_as_the_run_was_promised(host: AgentHost) -> None:
    run = host.python(
        "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: None)\nopen('out/up', 'w').close()\n"
        "while True: time.sleep(0.1)",
        endurance={"stop_grace": 0.7},
    )
    host.call("launch", chain=[run])
    wait_for(lambda: (host.paths(run).dir / "out" / "up").is_file())
    done = host.call("cancel", run=run, by="test")
    assert done["forced"]
    assert 0.7 <= done["grace_used"] < 10.0
