"""What a run held beside what it was planned to hold, measured on runs of this machine."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from latentforge.events import EventLog, read_events
from latentforge.memory import MemoryPlan, Term
from latentforge.train import effective, memory
from latentforge.train.rehearsal import tiny_run


@pytest.fixture(scope="module")
def runs() -> list[Path]:
    """The folders of the pipeline ``tiny``, run once."""
    return sorted(tiny_run().path.parent.iterdir())


def test_each_run_says_what_it_was_planned_to_hold_and_what_it_held(runs: list[Path]) -> None:
    seen = set()
    for run in runs:
        kind = run.name.partition("-")[0]
        found = [event.fields for event in read_events(run / "events.jsonl") if event.kind == "memory"]
        if kind == "data":
            assert not found
            continue
        planned, measured = found
        assert planned["planned_own_bytes"] == measured["planned_bytes"]
        assert 0 < measured["measured_bytes"] <= 1.15 * measured["planned_bytes"]
        recorded = json.loads((run / "effective.json").read_bytes())["memory"]
        assert (recorded["measured_bytes"], recorded["over"]) == (measured["measured_bytes"], None)
        assert recorded["terms"]["planned_runtime"] > 0
        seen.add(kind)
    assert seen == {"teacher", "score", "distill"}


def test_a_run_that_holds_far_more_than_its_plan_warns_in_its_log_and_its_record(tmp_path: Path) -> None:
    from latentforge.spec.run import RunDir

    folder = tmp_path / "score-0123456789abcdef0123"
    folder.mkdir()
    run, text = RunDir(folder), io.StringIO()
    with EventLog(run.events_file, run.run, text=text) as log:
        before = memory.begin_measuring()
        held = bytearray(os.urandom(1 << 20)) * 300
        found = memory.compare(run, log, MemoryPlan("score", (Term("runtime", 2**20),)), before=before)
        del held
    assert found.measured > 300 << 20
    assert "warning: the run held" in text.getvalue()
    assert [event.kind for event in read_events(run.events_file)] == ["memory", "warning"]
    assert effective.read(run)["memory"]["over"].startswith("the run held")


def test_the_peak_of_what_ran_before_in_the_process_is_forgotten() -> None:
    held = bytearray(os.urandom(1 << 20)) * 200
    before = memory.begin_measuring()
    del held
    memory.begin_measuring()
    assert effective.peak_memory_bytes() < before - (100 << 20)
