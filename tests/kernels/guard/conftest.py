"""A machine without a GPU, records in a folder of the test's, and stub kernels that children can import."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from latentforge.kernels.guard.machine import Machine
from latentforge.kernels.guard.records import Records
from latentforge.kernels.guard.variants import Variant
from latentforge.kernels.guard.warmup import Limits, WarmUp

HERE = Path(__file__).parent
sys.path.append(str(HERE))
QUICK = Limits(load=120.0, parity=120.0, cost=120.0, freeze=120.0, calls=5, seconds=0.0)


@pytest.fixture(autouse=True)
def _stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


@pytest.fixture
def machine() -> Machine:
    """A machine whose parts are known."""
    return Machine(None, 0, "none", "none", "none", "2.13.0", "3.9.0", "13.4.59", "6.17.0")


@pytest.fixture
def records(tmp_path: Path) -> Records:
    """An empty store."""
    found = Records(tmp_path / "warmup")
    found.prepare()
    return found


def stub(entry: str, **fields: Any) -> Variant:
    """A variant of a stub on small shapes of the CPU."""
    shapes = ((2, 33), (5, 103))
    return Variant("kd_loss", "fp32", "cpu", f"guard_stubs:{entry}", **{"device": "cpu", "shapes": shapes, **fields})


@pytest.fixture
def warm_up(machine: Machine, records: Records) -> Any:
    """``warm_up(*entries, **options)``: one run, its lines."""

    def run(*entries: str | Variant, **options: Any) -> list[Any]:
        variants = [stub(one) if isinstance(one, str) else one for one in entries]
        return WarmUp(machine, records, **{"limits": QUICK, **options}).run(variants)

    return run
