"""What a probe says of the folder of a teacher that a server answers for, and of a file of targets."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from dispatch.agent import folders
from dispatch.agent.protocol import AgentError

VOCABULARY = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}


def folder(path: Path, **files: Any) -> Path:
    path.mkdir()
    for name, value in (
        {"config.json": {"model_type": "qwen3", "vocab_size": 2}, "tokenizer.json": VOCABULARY} | files
    ).items():
        if value is not None:
            (path / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_folder_without_weights_is_a_served_teachers_and_no_models(tmp_path: Path) -> None:
    found = folders.inspect(str(folder(tmp_path / "t")), "tokenizer")
    assert (found["ok"], found["vocab_size"], found["tokenizer"]) == (True, 2, True)
    assert len(found["sha256"]) == 64
    assert "has no weights" in folders.inspect(str(tmp_path / "t"), "model")["reason"]


@pytest.mark.parametrize(
    ("lacking", "told"),
    [
        ({"config.json": None}, "config.json is missing"),
        ({"tokenizer.json": None}, "has no tokenizer.json"),
        ({"tokenizer.json": "{"}, "tokenizer.json"),
        ({"config.json": "[]"}, "not a JSON object"),
    ],
)
def test_a_tokenizer_folder_that_lacks_a_part_is_refused(tmp_path: Path, lacking: dict[str, Any], told: str) -> None:
    found = folders.inspect(str(folder(tmp_path / "t", **lacking)), "tokenizer")
    assert found["ok"] is False
    assert told in found["reason"]


def test_a_store_is_a_file_of_sqlites_that_nobody_is_writing(tmp_path: Path) -> None:
    store = tmp_path / "targets.sqlite"
    connection = sqlite3.connect(store)
    connection.execute("CREATE TABLE rows (key BLOB)")
    connection.close()
    assert folders.inspect(str(store), "targets")["ok"] is True
    (tmp_path / "targets.sqlite-wal").write_bytes(b"x")
    assert "is being written" in folders.inspect(str(store), "targets")["reason"]
    (tmp_path / "text").write_text("no store at all")
    assert "is no SQLite file" in folders.inspect(str(tmp_path / "text"), "targets")["reason"]
    assert "does not exist" in folders.inspect(str(tmp_path / "none"), "targets")["reason"]


def test_a_purpose_that_is_not_known_is_a_fault_of_the_asker(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="tokenizer"):
        folders.inspect(str(tmp_path), "tokeniser")
