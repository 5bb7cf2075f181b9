"""A small distilled student with its evidence, and the same with faults that its evidence covers."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from latentforge.evidence.ledger import LEDGER
from latentforge.promotion.checks import with_evidence
from latentforge.spec.resolve import resolve_pipeline
from latentforge.train.inprocess import execute_pipeline


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a student of the recipe ``tiny``."""
    root = tmp_path_factory.mktemp("promotion")
    run = execute_pipeline(resolve_pipeline("tiny", env={}).spec, root, text=io.StringIO())["distill"].path
    shutil.rmtree(run / "out" / "checkpoints", ignore_errors=True)
    return with_evidence(run)


@pytest.fixture
def student(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change, beside its ledger."""
    runs = tmp_path / "runs"
    runs.mkdir()
    shutil.copy2(trained.parent / LEDGER, runs)
    return Path(shutil.copytree(trained, runs / trained.name))


@pytest.fixture
def broken(student: Path) -> Callable[[Callable[[Path], object]], Path]:
    """A student that was changed before its evidence was written: nothing but its promotion can see it."""

    def change(plant: Callable[[Path], object]) -> Path:
        plant(student)
        return with_evidence(student)

    return change
