"""What a beat tells of a run: its whole tree's use, and nothing invented where a reading is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dispatch.agent.hardware import meminfo
from dispatch.agent.telemetry import GpuQuestion, Telemetry, parse_gpus, together
from dispatch.hosts.facts import RunState

from .conftest import AgentHost, wait_for

_BUSY_GRANDCHILD = """
import os, time
held = b"x" * (64 << 20)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open("out/written", "wb").write(bytes(3 << 20))
        end = time.process_time() + 0.5
        while time.process_time() < end: pass
        open("out/done", "w").close()
        time.sleep(600)
    os._exit(0)
os.wait()
while not os.path.exists("out/done"): time.sleep(0.01)
time.sleep(600)
"""


def test_a_beat_counts_the_whole_tree_and_reaches_whoever_asks_for_the_state(
    host: AgentHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = host.python(_BUSY_GRANDCHILD)
    host.call("launch", chain=[run])

    def beat() -> dict[str, Any] | None:
        found = host.state(run)["beat"]
        return found if found and found["cpu"] >= 0.5 else None

    found = wait_for(beat, seconds=30)
    assert set(found) == {"count", "clock", "wall", "log", "cpu", "io", "rss", "mem_available", "gpu"}
    assert found["io"] >= 3 << 20
    assert found["rss"] > 64 << 20
    assert 0 < found["mem_available"] <= meminfo()["MemTotal"]
    seen = RunState.model_validate(host.state(run))
    assert seen.beat == found
    host.call("cancel", run=run, grace=0)
    assert host.state(run)["beat"] is None


_OUTLIVED = """
import json, subprocess, sys
from dispatch.agent.telemetry import Telemetry
telemetry = Telemetry()
burn = "import time\\nwhile time.process_time() < 0.4: pass"
subprocess.run([sys.executable, "-I", "-S", "-c", burn], check=True)
print(json.dumps([telemetry.read(None), telemetry.read(None)]))
"""


def test_the_time_of_a_child_that_has_ended_stays_counted() -> None:
    # In a process of its own: this one has had other children, and may have some now.
    told = subprocess.run([sys.executable, "-c", _OUTLIVED], capture_output=True, text=True, check=True).stdout
    first, second = json.loads(told)
    assert first["cpu"] >= 0.3
    assert second["cpu"] >= first["cpu"]
    assert first["rss"] == 0  # nobody is left


def test_what_may_not_be_read_is_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispatch.agent.telemetry.io_of", lambda pid: None)
    monkeypatch.setattr("dispatch.agent.telemetry.meminfo", dict)
    found = Telemetry().read(None)
    assert (found["io"], found["mem_available"], found["gpu"]) == (None, None, None)


@pytest.mark.parametrize(
    ("answer", "gpu"),
    [
        ("37, 61.50, 54, 2411\n", {"util": 37.0, "watts": 61.5, "celsius": 54.0, "sm_mhz": 2411.0}),
        ("0, [N/A], 40, [Not Supported]\n", {"util": 0.0, "watts": None, "celsius": 40.0, "sm_mhz": None}),
        ("[N/A], [N/A], [N/A], [N/A]\n", {"util": None, "watts": None, "celsius": None, "sm_mhz": None}),
        ("nan, inf, x, \n", {"util": None, "watts": None, "celsius": None, "sm_mhz": None}),
        ("5, 10, 40, 200\n90, 30, [N/A], 1000\n", {"util": 90.0, "watts": 40.0, "celsius": 40.0, "sm_mhz": 1000.0}),
        ("No devices were found\n", None),
        ("", None),
    ],
)
def test_a_gpu_reading_that_is_not_available_is_null_never_zero(answer: str, gpu: dict[str, Any] | None) -> None:
    assert together(parse_gpus(answer)) == gpu


def _fake(folder: Path, script: str) -> str:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(program)


def test_the_gpu_is_asked_beside_the_beat_never_waited_for(tmp_path: Path) -> None:
    (tmp_path / "gate").mkdir()
    gate = tmp_path / "gate" / "open"
    program = _fake(tmp_path, f"while [ ! -e {gate} ]; do sleep 0.01; done; echo '42, 20.0, 50, 1800'")
    question = GpuQuestion(program)
    assert question.answer() is None  # the program, which ends at the gate alone, was not waited for
    pid = question.pid
    assert question.answer() is None
    assert question.pid == pid  # nor is a second one started beside the first
    gate.touch()
    assert wait_for(question.answer) == {"util": 42.0, "watts": 20.0, "celsius": 50.0, "sm_mhz": 1800.0}
    question.close()
    assert question.pid is None


def test_a_gpu_question_that_hangs_is_given_up_with_its_last_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dispatch.agent.telemetry._GPU_SECONDS", 0.0)
    question = GpuQuestion(_fake(tmp_path, "exec sleep 600"))
    assert question.answer() is None
    first = question.pid
    assert first is not None
    wait_for(lambda: question.answer() is None and question.pid != first)
    assert not os.path.exists(f"/proc/{first}")
    question.close()


def test_a_gpu_question_under_way_is_no_leftover_of_the_run(host: AgentHost, tmp_path: Path) -> None:
    _fake(tmp_path, "exec sleep 600")
    host.environment = {**host.environment, "PATH": f"{tmp_path}:{host.environment['PATH']}"}
    run = host.python("import time; time.sleep(0.3)")
    host.call("launch", chain=[run])
    state = host.wait(run, "finished")
    record = host.call("collect", run=run)["exit"]
    assert (state["outcome"], state["class"], record["leftovers"], record["survivors"]) == ("pass", "exited", 0, [])
