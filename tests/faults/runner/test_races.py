"""Thirty launches at once, two plans on one device: one start, and everybody is told the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dispatch.agent import protocol

from .conftest import Refusal, wait_for

_COUNT = "import os; fd = os.open('out/starts', os.O_WRONLY | os.O_CREAT | os.O_APPEND); os.write(fd, b'x')"
_WAIT = f"{_COUNT}; import time; open('out/ready', 'w').close(); time.sleep(600)"

Race = Callable[[str], list[dict[str, Any]]]

# The agent's modules are loaded once; each racer is a process of its own that waits at a gate, so that all thirty
# begin in the same moment: closer together than thirty programs that are started one after the other ever get.
_STABLE = """
import io, json, os, sys
from dispatch.agent import cas, launching, runner, systemd
from dispatch.agent.__main__ import serve
from dispatch.agent.processes import AGENT, call_myself
installed, racers = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
for request in sys.stdin.buffer:
    gate_read, gate_write = os.pipe()
    answers, pids = [], []
    for _ in range(racers):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(gate_write)
            os.umask(0o077)
            call_myself(AGENT)
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            os.read(gate_read, 1)
            data = serve(io.BytesIO(request), cas.Origin(None, installed))
            while data:
                data = data[os.write(write, data):]
            os._exit(0)
        os.close(write)
        answers.append(read)
        pids.append(pid)
    os.close(gate_write)
    told = []
    for read in answers:
        with open(read, "rb") as file:
            told.append(file.read().decode())
    for pid in pids:
        os.waitpid(pid, 0)
    os.close(gate_read)
    print(json.dumps(told), flush=True)
"""


def _race(host: Any, launched: Race) -> None:
    run = host.python(f"{_COUNT}; import time; time.sleep(0.1)", lease=["device"])
    answers = launched(run)
    assert host.wait(run, "finished", seconds=60)["outcome"] == "pass"
    assert (host.paths(run).out / "starts").read_text() == "x"
    assert len(answers) == 30
    assert sum(answer["started"] for answer in answers) == 1
    assert {name for answer in answers for name in answer["states"]} == {run}


@contextmanager
def _stable(host: Any, racers: int = 30) -> Iterator[Race]:
    """Thirty racers at a gate, as often as asked for."""
    installed = host.call("install")["path"]
    environment = {**host.environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*host.prefix, sys.executable, "-c", _STABLE, installed, str(racers)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd="/")
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    assert stdout.readline() == b"ready\n"

    def launched(run: str) -> list[dict[str, Any]]:
        args = {"chain": [run], **({"runner": host.runner} if host.runner else {})}
        stdin.write(protocol.encode_request("launch", root=str(host.dir), args=args))
        stdin.flush()
        frames = [protocol.find_frame(told.encode()) for told in json.loads(stdout.readline())]
        assert all(frame is not None and frame.document["ok"] for frame in frames), frames
        return [frame.document["result"] for frame in frames if frame is not None]

    with process:
        yield launched
        stdin.close()
    assert process.returncode == 0


@pytest.mark.fault(row=19)
def test_thirty_dispatchers_of_one_plan_start_it_once(either_host: Any) -> None:
    either_host.call("install")
    either_host.installed = True

    def launched(run: str) -> list[dict[str, Any]]:
        started = [either_host.start("launch", {"chain": [run]}) for _ in range(30)]
        return [either_host.finish(process).document["result"] for process in started]

    _race(either_host, launched)


@pytest.mark.soak
@pytest.mark.fault(row=19)
def test_thirty_dispatchers_start_one_run_a_hundred_times_over(either_host: Any) -> None:
    begun = time.monotonic()
    with _stable(either_host) as launched:
        for number in range(100):
            _race(either_host, launched)
            print(f"race {number + 1}: {time.monotonic() - begun:.0f} s", flush=True)
    print(f"100 races of 30, one start each: {time.monotonic() - begun:.0f} s ({either_host.runner or 'detached'})")


@pytest.mark.fault(row=20)
def test_of_two_plans_for_one_device_one_runs_and_the_other_learns_who_has_it(either_host: Any) -> None:
    either_host.call("install")
    either_host.installed = True
    runs = [either_host.python(_WAIT, lease=["device"]) for _ in range(2)]
    racers = [either_host.start("launch", {"chain": [run]}) for run in runs]
    winner = loser = None
    for run, racer in zip(runs, racers, strict=True):
        try:
            assert either_host.finish(racer).document["result"]["started"] is True
            winner = run
        except Refusal as refusal:
            loser, told = run, refusal
    assert winner is not None
    assert loser is not None
    assert (told.kind, told.code) == ("busy", 7)
    # Who is told before the winner has signed may learn no more than that; asked again, the name is there.
    holder = wait_for(lambda: (h := either_host.call("probe")["lease"]["device"]) and h.get("run") and h)
    assert holder["run"] == winner
    with pytest.raises(Refusal) as again:
        either_host.call("launch", chain=[loser])
    assert (again.value.detail["holder"]["run"], again.value.code) == (winner, 7)
    either_host.call("cancel", run=winner, grace=0)
    assert not (either_host.paths(loser).out / "starts").exists()
    either_host.call("launch", chain=[loser])
    wait_for(lambda: (either_host.paths(loser).out / "ready").exists())
    either_host.call("cancel", run=loser, grace=0)
