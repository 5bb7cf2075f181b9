"""A full disk: refused before a run, told at its end, never green by it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from dispatch.agent import exitrec

from .conftest import AgentHost, Refusal, identity_of

_FILL = """
import contextlib, os
with open("out/filler", "wb", buffering=0) as file:
    for size in (1 << 20, 1 << 12, 1):
        with contextlib.suppress(OSError):
            while True: file.write(bytes(size))
raise SystemExit({code})
"""


def _fill(path: Path, leave: int = 0) -> None:
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
        if leave:
            file.truncate(file.tell() - leave)


@pytest.mark.parametrize(("code", "outcome"), [(0, "unknown"), (7, "crashed")])
def test_a_job_that_fills_the_disk_has_its_exit_recorded_and_is_not_green(
    small_host: AgentHost, code: int, outcome: str
) -> None:
    state = small_host.ran(_FILL.replace("{code}", str(code)))
    assert (state["state"], state["code"], state["outcome"]) == ("finished", code, outcome)
    assert "artifacts.json" in state["reason"]
    assert exitrec.read(small_host.paths(state["run"]).exit) is not None


def test_a_reservation_on_a_full_disk_is_refused_and_leaves_nothing(small_host: AgentHost) -> None:
    small_host.call("install")
    _fill(small_host.dir / "filler")
    run, identity = identity_of("data")
    with pytest.raises(Refusal) as refusal:
        small_host.call("reserve", run=run, identity=identity, launch=small_host.launch_of(run, ["/bin/true"]))
    assert (refusal.value.kind, refusal.value.code) == ("disk-full", 2)
    assert os.listdir(small_host.root.runs) == []


def test_a_launch_without_room_for_its_records_is_refused(small_host: AgentHost) -> None:
    run = small_host.python("pass")
    _fill(small_host.dir / "filler", leave=4 << 20)
    with pytest.raises(Refusal, match="a run needs 16") as refusal:
        small_host.call("launch", chain=[run])
    assert refusal.value.kind == "disk-full"
    assert small_host.state(run)["state"] == "reserved"


def test_an_upload_to_a_full_disk_is_refused_and_leaves_nothing(small_host: AgentHost) -> None:
    small_host.call("install")
    _fill(small_host.dir / "filler")
    with pytest.raises(Refusal) as refusal:
        small_host.frame("put", {"sha256": "0" * 64}, bytes(100_000))
    assert (refusal.value.kind, refusal.value.code) == ("disk-full", 2)
    assert os.listdir(small_host.root.cas) == []
