"""A laptop of its own for every test here too: what is followed is written below its state folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from dispatch.places import Places


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "config", tmp_path / "state", tmp_path / "runs")
