"""``latentforge run``: the folder it is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentforge.cli import main


def test_a_run_can_be_executed_from_inside_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / f"data-{'0' * 20}"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert main(["run", "."]) == 2
    assert f"identity.json is missing from {folder}" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path)]) == 2
    assert repr(tmp_path.name) in capsys.readouterr().err
