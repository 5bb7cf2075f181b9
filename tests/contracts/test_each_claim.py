"""Each claim of each contract is run with its planted control: it holds, and the control is seen failing.

By construction nothing is left out: the list is that of the contracts themselves. What is outside its scope on this
machine (a GPU's) cannot be run; a test that shows its control failing here is named for it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from latentforge.contracts import check_contract, load_contracts
from latentforge.verdicts import Outcome

CONTRACTS = load_contracts()
TESTS = Path(__file__).parents[1]
CONTROL_SEEN_BY = {
    "F-BACKEND-SELECT-003": "teachers/precision/test_contract.py",
    "F-DISTILL-CUDA-STUDENT-001": "train/test_gpu_student.py",
}
"""Claims about a GPU: the test that sees each one's control fail where there is none."""


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
