"""The memory watchdog: warns once, ends the run before the host goes down, and looks whether that helped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.agent import journal
from dispatch.agent.hardware import meminfo
from dispatch.agent.processes import look
from dispatch.agent.stopping import Stop
from dispatch.agent.watchdog import GIB, Floors, Watchdog, available
from latentforge.memory import kill_floor, margin

from .conftest import AgentHost, Refusal, wait_for


@pytest.mark.parametrize("total", [8 * GIB, 24 * GIB, 119 * GIB, 128 * GIB, 512 * GIB])
def test_the_floors_are_those_of_the_memory_plan(total: int) -> None:
    assert Floors.usual(total) == (margin(total), kill_floor(total))


def test_a_small_host_keeps_room_to_run_in() -> None:
    floors = Floors.usual(24 * GIB)
    assert floors.warn < 3 * GIB
    assert floors.kill < 1.5 * GIB
    assert Floors.usual(128 * GIB) == (128 * GIB * 12 // 100, 128 * GIB * 6 // 100)
    assert Floors.usual(512 * GIB) == (16 * GIB, 8 * GIB)
    assert Floors.usual(None) == (0, 0)


@pytest.mark.parametrize(
    ("given", "floors"),
    [
        ({}, Floors.usual(100 * GIB)),
        ({"kill": 0, "warn": 0}, (0, 0)),
        ({"kill": 5 * GIB}, (12 * GIB, 5 * GIB)),
        ({"kill": 20 * GIB}, (20 * GIB, 20 * GIB)),
    ],
)
def test_a_launch_may_set_its_floors(given: dict[str, int], floors: tuple[int, int]) -> None:
    assert Floors.of({"memory_floors": given}, 100 * GIB) == floors


@pytest.mark.parametrize("floors", [[1, 2], {"warn": -1}, {"kill": True}, {"kill": 1.5}, {"other": 1}, "8 GiB"])
def test_floors_that_mean_nothing_are_refused_with_their_value(host: AgentHost, floors: Any) -> None:
    with pytest.raises(Refusal, match="memory_floors") as refusal:
        host.python("pass", memory_floors=floors)
    assert refusal.value.code == 2


class _Memory:
    """A file that stands in for /proc/meminfo."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "meminfo"
        self.set(64 * GIB)

    def set(self, left: int) -> None:
        text = (
            f"MemTotal:       134217728 kB\nMemFree:         1 kB\nMemAvailable:   {left >> 10:>9} kB\nBuffers: 1 kB\n"
        )
        self.path.write_text(text)


@pytest.fixture
def memory(tmp_path: Path) -> _Memory:
    return _Memory(tmp_path)


def test_a_look_reads_the_kernels_own_figure_into_a_buffer_that_is_there() -> None:
    fd = os.open("/proc/meminfo", os.O_RDONLY)
    buffer = bytearray(8192)
    found = available(fd, buffer)
    os.close(fd)
    assert abs(found - meminfo()["MemAvailable"]) < 2 * GIB
    assert available(fd, buffer) == -1


@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB\n", "MemAvailable:\n", "MemAvailable: none kB\n"])
def test_what_cannot_be_read_is_told_and_ends_nothing(memory: _Memory, text: str) -> None:
    memory.path.write_text(text)
    told, stop = _Told(), Stop(list)
    dog = Watchdog(Floors(16 * GIB, 8 * GIB), stop, told, meminfo=str(memory.path))
    dog.start()
    dog.finish()
    assert (told.events, stop.why) == (["watchdog-blind"], None)


class _Told:
    """What a watchdog journals."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.fields: list[dict[str, Any]] = []

    def __call__(self, event: str, **fields: Any) -> None:
        self.events.append(event)
        self.fields.append(fields)


def test_a_low_memory_is_warned_of_once_until_it_has_recovered(memory: _Memory) -> None:
    told, stop = _Told(), Stop(list)
    dog = Watchdog(Floors(16 * GIB, 8 * GIB), stop, told, meminfo=str(memory.path))
    for left in (17, 15, 14, 16.5, 15, 30, 15):
        memory.set(int(left * GIB))
        assert dog.look() is False
    dog.finish()
    assert told.events == ["memory-low", "memory-low"]
    assert "15.0 GiB available, the run is ended below 8.0 GiB" in told.fields[0]["reason"]
    assert stop.why is None


def test_a_look_allocates_nothing_that_stays(memory: _Memory) -> None:
    dog = Watchdog(Floors(16 * GIB, 8 * GIB), Stop(list), _Told(), meminfo=str(memory.path))
    for _ in range(10):
        dog.look()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(2000):
            dog.look()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        dog.finish()
    assert after - before < 512
    assert peak - before < 1024


_DEAF = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
if os.fork() == 0: os.setsid()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("after", "rose"), [(40 * GIB, True), (3 * GIB, False)])
def test_below_the_floor_a_deaf_tree_is_gone_after_its_grace_and_the_memory_is_looked_at_again(
    memory: _Memory, after: int, rose: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dispatch.agent.watchdog._RECOVERY_SECONDS", 1.0)
    tree = subprocess.Popen([sys.executable, "-I", "-S", "-c", _DEAF], stdout=subprocess.PIPE, start_new_session=True)
    assert tree.stdout is not None
    for _ in range(2):
        assert tree.stdout.readline() == b"ready\n"

    def members() -> list[Any]:
        tree.poll()
        children = Path(f"/proc/{tree.pid}/task/{tree.pid}/children")
        pids = [tree.pid, *seen]
        if children.exists():
            seen.update(int(pid) for pid in children.read_text().split())
        found = [process for pid in pids if (process := look(pid)) is not None and process.alive]
        if not found:
            memory.set(after)
        return found

    seen: set[int] = set()
    members()
    told, stop = _Told(), Stop(members)
    dog = Watchdog(Floors(16 * GIB, 8 * GIB), stop, told, meminfo=str(memory.path), seconds=0.01, grace=0.3)
    begun = time.monotonic()
    memory.set(3 * GIB)
    dog.start()
    wait_for(lambda: "watchdog-after" in told.events)
    assert time.monotonic() - begun >= 0.3
    dog.finish()
    assert tree.wait(timeout=5) == -signal.SIGKILL
    assert not members()
    assert told.events == ["watchdog", "watchdog-after"]
    assert told.fields[1]["rose"] is rose
    assert stop.why is not None
    assert stop.why[0] == "watchdog"
    assert stop.why[1].startswith("memory watchdog: 3.0 GiB available, below the floor of 8.0 GiB; ")
    assert ("40.0 GiB after it was ended" in stop.why[1]) is rose
    assert ("not its memory" in stop.why[1]) is not rose
    tree.stdout.close()


def test_a_run_below_its_floor_is_killed_with_all_that_it_started_and_says_why(host: AgentHost) -> None:
    program = (
        "import os, time\n"
        "if os.fork() == 0: os.setsid()\n"
        "else: open('out/pid', 'w').write(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    most = 1 << 60  # more than any host has
    run = host.python(program, memory_floors={"warn": most, "kill": most})
    host.call("launch", chain=[run])
    state = host.wait(run, "finished", seconds=30)
    assert (state["outcome"], state["class"], state["exit"]) == ("killed", "watchdog", 5)
    assert state["reason"].startswith("memory watchdog: ")
    events = [event["event"] for event in journal.read(host.paths(run)).events]
    assert events[:3] == ["launching", "started", "watchdog"]
    assert "watchdog-after" in events


def test_a_run_that_warns_shows_it_while_it_goes_on(host: AgentHost) -> None:
    run = host.python("import time; time.sleep(600)", memory_floors={"warn": 1 << 60, "kill": 0})
    host.call("launch", chain=[run])
    state = wait_for(lambda: (s := host.state(run))["warning"] and s)
    assert state["state"] == "running"
    assert "memory is low" in state["warning"]
    host.call("cancel", run=run, grace=0)


def test_a_second_reason_to_stop_does_not_replace_the_first() -> None:
    stop = Stop(list)
    tries: list[Callable[[], bool]] = [lambda: stop.begin("watchdog", "first", 1), lambda: stop.begin("signal", "x", 1)]
    assert [one() for one in tries] == [True, False]
    assert stop.why == ("watchdog", "first")
    assert threading.active_count() < 50
