"""Each claim of each contract is run with its planted control: it holds, and the control is seen failing.

By construction nothing is left out: the list is that of the contracts themselves. What is outside its scope on this
machine (a GPU's) cannot be run; a test that shows its control failing here is named for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from latentforge.kernels.guard.records import Record, Records, state_folder

from ..claims import BESIDE, CONTRACTS, CONTROL_SEEN_BY, PROVEN, claims_of, lend, require_claim


def _id(falsifier_id: str, function: str) -> str:
    # Before the colon: what shares a trained run shares a worker (tests/conftest.py).
    return f"{'.'.join(function.split('.')[:2])}:{falsifier_id}"


@pytest.mark.parametrize("falsifier_id", [pytest.param(name, id=_id(name, check)) for name, check in claims_of(None)])
def test_the_claim_holds_and_its_control_is_seen_failing(falsifier_id: str) -> None:
    require_claim(falsifier_id)


def _run_by(test: Callable[[str], None]) -> list[str]:
    (mark,) = (mark for mark in test.pytestmark if mark.name == "parametrize")  # type: ignore[attr-defined]
    return [getattr(one, "values", (one,))[0] for one in mark.args[1]]


def test_each_claim_is_run_by_one_test() -> None:
    run = _run_by(test_the_claim_holds_and_its_control_is_seen_failing)
    for module in BESIDE.values():
        beside = importlib.import_module(f"{__package__.partition('.')[0]}.{module}")
        assert require_claim.__name__ in beside.test_the_claim_holds_and_its_control_is_seen_failing.__code__.co_names
        run += _run_by(beside.test_the_claim_holds_and_its_control_is_seen_failing)
    assert sorted(run) == sorted(one.id for _, one in CONTRACTS.falsifiers())


def test_only_claims_about_a_gpu_are_left_to_another_test() -> None:
    left = {one.id for contract, one in CONTRACTS.falsifiers() if contract.scope_of(one).device == "cuda"}
    assert left == CONTROL_SEEN_BY.keys()


def test_a_claim_is_run_with_what_was_proven_on_this_machine(tmp_path: Path) -> None:
    assert state_folder() != PROVEN  # read before the test's own folders were put in place
    kept, record = Records(tmp_path / "warmup"), Record("kd_loss", "f" * 20, "ok")
    kept.prepare()
    kept.write(record)
    lend(kept.folder)
    assert Records().read(record.key) == record
    assert Records().folder != kept.folder
