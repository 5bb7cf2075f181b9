"""A small distilled student with its evidence, and the same with faults that its evidence covers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from latentforge.evidence.ledger import LEDGER
from latentforge.promotion.checks import copy_of, with_evidence
from latentforge.promotion.gate import Gate, look
from latentforge.train.rehearsal import tiny_run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a student of the recipe ``tiny``, beside a ledger."""
    return with_evidence(copy_of(tiny_run().path, tmp_path_factory.mktemp("promotion")))


@pytest.fixture
def student(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change, beside its ledger."""
    runs = tmp_path / "runs"
    runs.mkdir()
    shutil.copy2(trained.parent / LEDGER, runs)
    return Path(shutil.copytree(trained, runs / trained.name))


@pytest.fixture(scope="session")
def gate(trained: Path) -> Gate:
    """What was found of it, once for all tests that change nothing."""
    return look(trained, smoke=True)


@pytest.fixture
def broken(student: Path) -> Callable[[Callable[[Path], object]], Path]:
    """A student that was changed before its evidence was written: nothing but its promotion can see it."""

    def change(plant: Callable[[Path], object]) -> Path:
        plant(student)
        return with_evidence(student)

    return change
