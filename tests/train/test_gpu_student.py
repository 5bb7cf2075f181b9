"""The parity of a student on a GPU: its check can fail, and shows nothing where there is no GPU.

F-DISTILL-CUDA-STUDENT-001 is run with its control by tests/contracts where there is a GPU, and here on the CPU.
"""

from __future__ import annotations

import pytest

from latentforge.contracts import check_contract, load_contracts
from latentforge.contracts.machine import Machine
from latentforge.train.checks import cuda_student_is_the_cpus
from latentforge.verdicts import Outcome

CONTRACTS = load_contracts()


def test_a_student_is_itself_and_one_without_kd_is_seen() -> None:
    assert cuda_student_is_the_cpus(device="cpu").passed is True
    assert cuda_student_is_the_cpus(device="cpu", mutant="forgetful").passed is False
    with pytest.raises(ValueError, match="unknown mutant 'other'"):
        cuda_student_is_the_cpus(mutant="other")


def test_without_a_gpu_it_is_unknown_and_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    contract = CONTRACTS.named("gpu-student")
    (outside,) = check_contract(contract, CONTRACTS, machine=Machine("x86_64", ()))
    assert (outside.verdict.outcome, outside.counts) == (Outcome.UNKNOWN, False)
    # A GPU that the driver knows and torch does not: asked for, and not shown.
    (unseen,) = check_contract(contract, CONTRACTS, machine=Machine("aarch64", ("sm_121",)))
    assert (unseen.verdict.outcome, unseen.counts) == (Outcome.UNKNOWN, True)
    assert unseen.verdict.text == "torch sees no CUDA device"
