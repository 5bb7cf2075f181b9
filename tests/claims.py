"""How a test runs a claim of a contract, and which claims run beside what they speak of.

``tests/contracts/test_each_claim.py`` runs all others, and proves that no claim is left out.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from latentforge.contracts import check_contract, load_contracts
from latentforge.kernels.guard.records import state_folder
from latentforge.verdicts import Outcome

CONTRACTS = load_contracts()
TESTS = Path(__file__).parent
BESIDE = {
    "latentforge.targets": "targets.test_claims",
    "latentforge.train": "train.test_claims",
    "latentforge.train.compiled_checks": "train.test_compiled",
    "latentforge.train.engines.checks": "train.engines.test_equality",
    "latentforge.train.hosts.checks": "train.engines.test_meeting",
}
"""Packages and modules of checks, of which the nearer counts, whose claims a module of tests in the room of their
subject runs: they share what its tests train, or need the same costly table."""
CONTROL_SEEN_BY = {
    "F-BACKEND-SELECT-003": "teachers/precision/test_contract.py",
    "F-DISTILL-CUDA-STUDENT-001": "train/test_gpu_student.py",
}
"""Claims about a GPU: the test that sees each one's control fail where there is none."""
PROVEN = state_folder()
"""What was proven of the kernels of this machine; read here, where a test's own folders do not hide it yet."""


def claims_of(tests: str | None) -> list[tuple[str, str]]:
    """The claims that a module of :data:`BESIDE` runs, or that none of them does: each id with its check."""
    found = ((one.id, one.function) for _, one in CONTRACTS.falsifiers())
    return [(name, check) for name, check in found if _runs(check.partition(":")[0]) == tests]


def _runs(module: str) -> str | None:
    """The module of tests that runs the claims of a module of checks."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((BESIDE[name] for name in names if name in BESIDE), None)


def lend(records: Path) -> None:
    """Copy these records to where the test's own are looked for: no test writes the user's."""
    if records.is_dir():
        shutil.copytree(records, state_folder(), dirs_exist_ok=True)


def require_claim(falsifier_id: str) -> None:
    """The claim holds and its control is seen failing; what is outside its scope here is left to the test that
    :data:`CONTROL_SEEN_BY` names."""
    lend(PROVEN)  # on a GPU nothing runs that was not proven there: a claim that computes on one would be unknown
    (found,) = check_contract(CONTRACTS.named(falsifier_id), CONTRACTS, only=[falsifier_id])
    if not found.counts:
        assert found.verdict.outcome is Outcome.UNKNOWN
        assert falsifier_id in (TESTS / CONTROL_SEEN_BY[falsifier_id]).read_text()
        return
    assert found.verdict.outcome is Outcome.PASS, found.verdict.line()
    assert found.control is not None
    assert found.control.passed is False
