"""Runs as units of the user's own service manager, a real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import MARK, Manager, Refusal, under, wait_for

_WAIT = "import time; open('out/ready', 'w').close(); time.sleep(600)"
_COUNT = "import os; fd = os.open('out/starts', os.O_WRONLY | os.O_CREAT | os.O_APPEND); os.write(fd, b'x')"


def _ready(host: Any, run: str) -> None:
    wait_for(lambda: (host.paths(run).out / "ready").exists())


def _facts(host: Any) -> dict[str, Any]:
    found: dict[str, Any] = host.frame("probe", {"runner": True}).document["result"]["runner"]
    return found


def test_a_run_is_a_unit_and_ends_as_it_would_anywhere(unit_host: Any) -> None:
    facts = _facts(unit_host)
    assert (facts["systemd"], facts["linger"]) == (True, True)
    assert facts["why"].startswith("systemd 2")
    run = unit_host.python("print('hello'); raise SystemExit(7)")
    unit_host.call("launch", chain=[run])
    state = unit_host.wait(run, "finished")
    assert (state["code"], state["outcome"], state["class"]) == (7, "crashed", "exited")
    assert unit_host.paths(run).log.read_text() == "hello\n"
    assert unit_host.call("collect", run=run)["exit"]["runner"] == "systemd"


def test_a_unit_carries_a_path_and_a_run_id_and_nothing_of_what_the_run_is_told(
    unit_host: Any, manager: Manager
) -> None:
    unit_host.environment = {**unit_host.environment, "PIP_INDEX_URL": "https://canary-of-the-host@index"}
    words = [sys.executable, "-I", "-c", _WAIT, "canary-argument", "$HOME", "%n", "$(touch canary)"]
    run = unit_host.reserve(words, env={"CANARY": "canary-value"})
    unit_host.call("launch", chain=[run])
    _ready(unit_host, run)
    state = unit_host.state(run)
    command = Path(f"/proc/{state['pid']}/cmdline").read_bytes().split(b"\0")
    assert command[-5:-1] == [b"canary-argument", b"$HOME", b"%n", b"$(touch canary)"]
    environment = Path(f"/proc/{state['pid']}/environ").read_bytes()
    assert b"canary-value" in environment
    assert b"canary-of-the-host" in environment
    assert manager.units() == [f"lf-{run}.service"]
    shown = manager.ask("systemctl", "--user", "show", f"lf-{run}.service").stdout
    transient = manager.ask("cat", f"/run/user/0/systemd/transient/lf-{run}.service").stdout
    assert run in shown
    assert run in transient
    line = Path(f"/proc/{state['supervisor_pid']}/cmdline").read_text()
    assert "canary" not in shown + transient + line
    assert not [path for path in unit_host.dir.rglob("*") if b"canary-of-the-host" in _content(path)]
    unit_host.call("cancel", run=run, grace=0)


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def test_a_unit_outlives_the_session_and_the_agent_that_asked_for_it(unit_host: Any) -> None:
    run = unit_host.python(_WAIT)
    unit_host.call("launch", chain=[run])
    _ready(unit_host, run)
    state = unit_host.state(run)
    group = Path(f"/proc/{state['pid']}/cgroup").read_text()
    assert f"lf-{run}.service" in group
    assert os.getsid(state["pid"]) == state["pid"]
    assert unit_host.call("cancel", run=run, grace=5)["survivors"] == []


@pytest.mark.fault(row=14)
def test_a_manager_that_stops_ends_its_runs_in_order_and_says_so(own_manager: Manager, tmp_path: Path) -> None:
    host = under(own_manager, tmp_path)
    program = (
        "import signal, sys\n"
        "def end(*_): open('out/told', 'w').close(); sys.exit(0)\n"
        "signal.signal(15, end); open('out/ready', 'w').close()\n"
        "while True: signal.pause()"
    )
    run, waiting = host.python(program), host.python("pass")
    host.call("launch", chain=[run, waiting])
    _ready(host, run)
    own_manager.process.send_signal(signal.SIGTERM)  # what a logout without lingering or a shutdown does
    state = host.wait(run, "finished", seconds=30)
    assert (host.paths(run).out / "told").exists()
    assert (state["outcome"], state["class"], state["exit"]) == ("killed", "signal", 5)
    assert "service manager stopped it" in state["reason"]
    assert host.state(waiting)["state"] == "absent"


@pytest.mark.fault(row=14)
def test_without_a_manager_or_lingering_a_unit_is_refused_and_auto_is_detached(
    own_manager: Manager, tmp_path: Path
) -> None:
    host = under(own_manager, tmp_path)
    own_manager.ask("sh", "-c", "rm /var/lib/systemd/linger/*")
    facts = _facts(host)
    assert (facts["systemd"], facts["linger"]) == (False, False)
    assert "loginctl enable-linger" in facts["why"]
    run = host.python("pass")
    with pytest.raises(Refusal, match="lingering is off"):
        host.call("launch", chain=[run])
    assert host.state(run)["state"] == "reserved"
    own_manager.ask("sh", "-c", "touch /var/lib/systemd/linger/$(id -un); rm -rf /run/user/0/systemd /run/user/0/bus")
    assert "does not answer" in _facts(host)["why"]
    own_manager.ask("sh", "-c", "umount --lazy /run/user")
    assert "no service manager" in _facts(host)["why"]
    host.call("launch", chain=[run], runner="auto")
    host.wait(run, "finished")
    assert host.call("collect", run=run)["exit"]["runner"] == "detached"


def test_a_state_root_that_a_command_line_would_change_is_refused(manager: Manager, tmp_path: Path) -> None:
    (tmp_path / "a $HOME").mkdir()
    host = under(manager, tmp_path / "a $HOME")
    run = host.python("pass")
    with pytest.raises(Refusal, match="command line") as refusal:
        host.call("launch", chain=[run])
    assert (refusal.value.code, host.state(run)["state"]) == (2, "reserved")


_LAUNCHER = """
import os, sys
from dispatch.agent import systemd, launching, detached
from dispatch.agent.cas import Origin
from dispatch.agent.paths import Root
from dispatch import agent_package
when = sys.argv[3]
def die(*_, **__): os.kill(os.getpid(), 9)
run, send = systemd._run, systemd.send
if when == "before the unit": systemd._run = die
if when == "before the orders": systemd.send = die
if when == "amid the orders":
    def half(peer, orders, descriptors):
        peer.sendall = die
        send(peer, orders, descriptors)
    class Peer:
        def __init__(self, peer): self.peer = peer
        def sendmsg(self, *a): return self.peer.sendmsg(*a)
        def sendall(self, data): die()
    systemd.send = lambda peer, orders, descriptors: send(Peer(peer), orders, descriptors)
if when == "before the reply": detached.hear = die
launching.launch(Root(sys.argv[1]), [sys.argv[2]], False, Origin(agent_package.agent_bytes(), None), "systemd")
"""


@pytest.mark.parametrize("when", ["before the unit", "before the orders", "amid the orders", "before the reply"])
def test_a_launcher_killed_at_any_point_of_the_hand_over_leaves_none_or_one(
    unit_host: Any, manager: Manager, when: str
) -> None:
    run = unit_host.python(f"{_COUNT}; {_WAIT}")
    command = [*manager.prefix, sys.executable, "-c", _LAUNCHER, str(unit_host.dir), run, when]
    environment = {**unit_host.environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run(command, env=environment, check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    if when == "before the reply":
        _ready(unit_host, run)
        assert unit_host.call("launch", chain=[run])["started"] is False
    else:
        host_state = wait_for(lambda: (s := unit_host.state(run))["state"] == "reserved" and s)
        assert host_state["pid"] is None
        assert unit_host.call("launch", chain=[run])["started"] is True
        _ready(unit_host, run)
    assert (unit_host.paths(run).out / "starts").read_text() == "x"
    unit_host.call("cancel", run=run, grace=0)


def test_the_mark_of_a_test_reaches_a_job_in_a_unit(unit_host: Any) -> None:
    """What the check for stray processes rests on."""
    run = unit_host.python(_WAIT)
    unit_host.call("launch", chain=[run])
    _ready(unit_host, run)
    assert unit_host.state(run)["pid"] in unit_host.marked()
    assert MARK
    unit_host.call("cancel", run=run, grace=0)
