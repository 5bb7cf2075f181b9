"""Each claim of each contract is run with its planted control: it holds, and the control is seen failing.

By construction nothing is left out: the list is that of the contracts themselves. What is outside its scope on this
machine (a GPU's) cannot be run; a test that shows its control failing here is named for it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from latentforge.contracts import check_contract, load_contracts
from latentforge.kernels.guard.records import Record, Records, state_folder
from latentforge.verdicts import Outcome

CONTRACTS = load_contracts()
TESTS = Path(__file__).parents[1]
CONTROL_SEEN_BY = {
    "F-BACKEND-SELECT-003": "teachers/precision/test_contract.py",
    "F-DISTILL-CUDA-STUDENT-001": "train/test_gpu_student.py",
}
"""Claims about a GPU: the test that sees each one's control fail where there is none."""
PROVEN = state_folder()
"""What was proven of the kernels of this machine; read here, where a test's own folders do not hide it yet."""


def lend(records: Path) -> None:
    """Copy these records to where the test's own are looked for: no test writes the user's."""
    if records.is_dir():
        shutil.copytree(records, state_folder(), dirs_exist_ok=True)


@pytest.fixture(autouse=True)
def _proven() -> None:
    """On a GPU nothing runs that was not proven there: without records each claim that computes on one is unknown."""
    lend(PROVEN)


def _id(falsifier_id: str, function: str) -> str:
    # Before the colon: what shares a trained run shares a worker (tests/conftest.py).
    return f"{'.'.join(function.split('.')[:2])}:{falsifier_id}"


@pytest.mark.parametrize(
    "falsifier_id", [pytest.param(one.id, id=_id(one.id, one.function)) for _, one in CONTRACTS.falsifiers()]
)
def test_the_claim_holds_and_its_control_is_seen_failing(falsifier_id: str) -> None:
    contract = CONTRACTS.named(falsifier_id)
    (found,) = check_contract(contract, CONTRACTS, only=[falsifier_id])
    if not found.counts:
        assert found.verdict.outcome is Outcome.UNKNOWN
        assert falsifier_id in (TESTS / CONTROL_SEEN_BY[falsifier_id]).read_text()
        return
    assert found.verdict.outcome is Outcome.PASS, found.verdict.line()
    assert found.control is not None
    assert found.control.passed is False


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
