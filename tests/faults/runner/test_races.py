"""Thirty launches at once, two plans on one device: one start, and everybody is told the same."""

from __future__ import annotations

import time
from typing import Any

import pytest

from .conftest import Refusal, wait_for

_COUNT = "import os; fd = os.open('out/starts', os.O_WRONLY | os.O_CREAT | os.O_APPEND); os.write(fd, b'x')"
_WAIT = f"{_COUNT}; import time; open('out/ready', 'w').close(); time.sleep(600)"


def _race(host: Any, racers: int = 30) -> None:
    run = host.python(f"{_COUNT}; import time; time.sleep(0.1)", lease=["device"])
    started = [host.start("launch", {"chain": [run]}) for _ in range(racers)]
    answers = [host.finish(process).document["result"] for process in started]
    assert host.wait(run, "finished", seconds=60)["outcome"] == "pass"
    assert (host.paths(run).out / "starts").read_text() == "x"
    assert sum(answer["started"] for answer in answers) == 1
    assert {name for answer in answers for name in answer["states"]} == {run}


@pytest.mark.fault(row=19)
def test_thirty_dispatchers_of_one_plan_start_it_once(either_host: Any) -> None:
    either_host.call("install")
    either_host.installed = True
    _race(either_host)


@pytest.mark.soak
@pytest.mark.fault(row=19)
def test_thirty_dispatchers_start_one_run_a_hundred_times_over(either_host: Any) -> None:
    either_host.call("install")
    either_host.installed = True
    begun = time.monotonic()
    for _ in range(100):
        _race(either_host)
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
