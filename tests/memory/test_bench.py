"""``latentforge bench memory``: planned beside measured, on trainings of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from latentforge.cli.bench import app
from latentforge.train import held, memory_bench
from latentforge.train.memory_bench import Case, Compared

SMALL = Case(layers=3, vocabulary=4096)


def test_the_peak_of_a_training_is_within_fifteen_percent_of_its_plan_and_a_wrong_plan_is_not() -> None:
    found = Compared.of(SMALL)
    assert found.holds, found
    assert found.resident >= found.in_use > 0
    # The planted faults: kept activations, planned as if they were computed again, and moments that were forgotten.
    kept = replace(SMALL, recomputed=True).planned
    assert not found._replace(planned=kept).holds
    assert not found._replace(planned=found.planned - 8 * SMALL.shape.parameters).holds


def test_the_command_prints_each_way_and_fails_where_a_plan_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(case: Case) -> Compared:
        return Compared(case, case.planned, case.planned * (2 if case.rank else 1), 3 * case.planned)

    monkeypatch.setattr(memory_bench.Compared, "of", of)
    done = CliRunner().invoke(app, ["memory", "--json"], standalone_mode=False)
    told = json.loads(done.stdout)
    assert {"fp32", "bf16, fp32 masters", "fp32, activations again", "fp32, 2 passes", "fp32, LoRA 16"} <= told.keys()
    assert told["fp32"]["planned_over_in_use"] == 1.0
    assert done.return_value == 1, "LoRA's plan is half of what was measured"
    monkeypatch.setattr(memory_bench.Compared, "of", lambda case: Compared(case, 100, 86, 100))
    assert CliRunner().invoke(app, ["memory"], standalone_mode=False).return_value == 1
    monkeypatch.setattr(memory_bench.Compared, "of", lambda case: Compared(case, 100, 88, 100))
    assert CliRunner().invoke(app, ["memory"], standalone_mode=False).return_value == 0


_KEPT = """
import ctypes
from latentforge.train import held

library = held.Heap()._library

def block(size):
    taken = library.malloc(size)
    ctypes.memset(taken, 1, size)
    return taken

library.free(block(16 << 20))  # from now on a megabyte comes from the heap
with held.watching() as watch:
    *blocks, last = (block(1 << 20) for _ in range(97))
    for one in blocks:  # the last one stays, and with it the heap's end
        library.free(one)
    large = block(128 << 20)  # which the room of the others is too small for
    peak = watch.peak()
print((peak.in_use - watch.before) >> 20, (peak.resident - watch.before) >> 20)
"""


def test_what_the_c_library_keeps_of_what_was_freed_is_resident_and_not_in_use() -> None:
    said = subprocess.run([sys.executable, "-c", _KEPT], check=True, stdout=subprocess.PIPE, text=True).stdout
    in_use, resident = map(int, said.split())
    assert 120 <= in_use <= 150
    assert resident >= 220


def test_another_allocator_is_told_from_the_c_librarys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert held.Heap().counts
    monkeypatch.setattr(held.Heap, "info", lambda _self: held._Info())
    assert not held.Heap().counts
    with held.watching() as watch:
        assert watch.peak().in_use is None
        assert watch.peak().resident > 0
        assert "memory" not in {thread.name for thread in threading.enumerate()}, (
            "it would look a thousand times a second"
        )
    assert held.Peak.sum([held.Peak(3, 2), held.Peak(4, None)]) == (7, None)
    assert held.Peak.sum([held.Peak(3, 2), held.Peak(4, 3)]) == (7, 5)
