"""The cap of the allocator, with a stand-in for torch.cuda that tells and takes what it does: none of it ran on a
GPU."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from latentforge.errors import FailedError
from latentforge.events import EventLog
from latentforge.memory import MemoryPlan, Term, pipeline_memory
from latentforge.memory.estimate import TWIN, student_shape
from latentforge.memory.plan import GIB
from latentforge.spec.resolve import resolve_pipeline
from latentforge.train.capping import capped, each_planned

REFUSED = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which 100.00 GiB is "
    "free. 36.00 GiB allowed; Of the allocated memory 34.50 GiB is allocated by PyTorch, and 0.50 GiB is reserved."
)
"""As torch words it where a fraction of the device is all that a process may take."""


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A device of 140 GiB with 120 free, 2 of which this process's allocator has; what it was told to keep to."""
    told: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (118 * GIB, 140 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", told.append)
    return told


def within(folder: Path, planned: int | None, device: str = "auto", raised: Exception | None = None) -> tuple[Any, str]:
    """What ``effective.json`` and the log say of a run that was capped, and ends by what is ``raised``."""
    identity = SimpleNamespace(kind="distill", spec={"distill": {"device": device}})
    run: Any = SimpleNamespace(effective_file=folder / "effective.json", load_identity=lambda: identity)
    text = io.StringIO()
    with EventLog(folder / "events.jsonl", "distill-" + "0" * 20, text=text) as log, capped(run, log, planned):
        if raised is not None:
            raise raised
    return json.loads(run.effective_file.read_bytes())["memory"]["allocator_cap_bytes"], text.getvalue()


@pytest.mark.parametrize(("planned", "cap"), [(20, 36), (110, 120)])
def test_the_cap_is_the_plan_and_the_margin_and_never_more_than_is_free(
    tmp_path: Path, fractions: list[float], planned: int, cap: int
) -> None:
    recorded, said = within(tmp_path, planned * GIB)
    assert recorded == cap * GIB
    assert fractions == [cap / 140, 1.0]  # and none for what this process runs next
    assert f"allocator capped at {cap}.0 of 140.0 GiB: the {planned}.0 GiB planned, and the margin" in said


def test_a_run_that_wants_more_than_its_cap_ends_with_plan_cap_and_what_to_do(
    tmp_path: Path, fractions: list[float]
) -> None:
    with pytest.raises(
        FailedError, match=r"than the 36.0 GiB .* 20.0 GiB were planned: .* allocate 2.00 GiB$"
    ) as found:
        within(tmp_path, 20 * GIB, raised=torch.OutOfMemoryError(REFUSED))
    assert found.value.next is not None
    assert all(word in found.value.next for word in ("micro_batch_size", "activation_checkpointing", "memory SPEC"))
    assert fractions[-1] == 1.0


@pytest.mark.parametrize(("planned", "device"), [(20 * GIB, "cpu"), (None, "auto")])
def test_on_a_cpu_and_without_a_whole_plan_nothing_is_set_and_that_is_recorded(
    tmp_path: Path, fractions: list[float], planned: int | None, device: str
) -> None:
    assert within(tmp_path, planned, device) == (None, "")
    assert fractions == []
    with pytest.raises(torch.OutOfMemoryError):
        within(tmp_path, planned, device, raised=torch.OutOfMemoryError(REFUSED))


def test_each_process_of_a_host_has_its_part_of_the_plan_and_none_of_one_that_is_not_known() -> None:
    plan = MemoryPlan("distill", (Term("student share", 8 * GIB), Term("engine", 4 * GIB, elsewhere=True)))
    assert each_planned(plan, 2) == 4 * GIB
    assert each_planned(MemoryPlan("distill", plan.terms, unknown=("the teacher",))) is None
    assert each_planned(None) is None


def test_the_first_of_eight_processes_may_gather_student_and_twin_when_it_saves_them() -> None:
    asked = ["distributed=fsdp2", "processes=8", "batch_size=8", "student.layers=24", "student.hidden=2048"]
    sizes = ["student.heads=16", "student.kv_heads=8", "student.intermediate=6144"]
    spec = resolve_pipeline("smoke", overrides=[f"distill.{one}" for one in (*asked, *sizes)]).spec
    count = student_shape(spec.distill.student, spec.data.vocab_size).parameters
    assert TWIN in spec.distill.require
    planned = each_planned(pipeline_memory(spec)["distill"], 8)
    # Of each of the two its whole weights and a model that they are put into, beside a share of weights and moments.
    assert planned is not None
    assert planned >= 2 * (4 * count + 4 * count + 12 * count // 8)
