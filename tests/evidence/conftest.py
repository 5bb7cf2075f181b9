"""Recorded runs to tamper with."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentforge.evidence.checks import recorded_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with two recorded runs and their ledger."""
    folder = tmp_path / "runs"
    folder.mkdir()
    recorded_run(folder, seed=6)
    recorded_run(folder, seed=7)
    return folder


@pytest.fixture
def run_dir(runs: Path) -> Path:
    """The run of the ledger's last entry."""
    from latentforge.evidence.ledger import read_chain

    return runs / read_chain(runs / "ledger.jsonl").entries[-1].run
