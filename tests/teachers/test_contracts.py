"""The contracts of vocabularies, providers and drawn targets pass, and each planted fault is seen to fail."""

from __future__ import annotations

import pytest

from latentforge.contracts import contracts_folder, load_contracts
from latentforge.contracts.runner import check_falsifier
from latentforge.contracts.schema import Contract
from latentforge.verdicts import Outcome

CONTRACTS: dict[str, Contract] = {
    contract.contract: contract
    for contract in load_contracts(contracts_folder())
    if contract.contract in ("vocabulary", "providers", "sampled-targets")
}
IDS = [(contract.contract, falsifier.id) for contract in CONTRACTS.values() for falsifier in contract.falsifiers]


def test_the_contracts_are_there() -> None:
    assert sorted(CONTRACTS) == ["providers", "sampled-targets", "vocabulary"]
    assert len(IDS) >= 8


@pytest.mark.parametrize(("contract", "falsifier"), IDS)
def test_the_claim_holds_and_its_control_fails(contract: str, falsifier: str) -> None:
    home = CONTRACTS[contract]
    one = next(item for item in home.falsifiers if item.id == falsifier)
    checked = check_falsifier(home, one)
    assert checked.verdict.outcome is Outcome.PASS, checked.verdict.line()
    assert checked.control is not None
    assert checked.control.passed is False
