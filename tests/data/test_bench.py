"""``latentforge bench data``: what it measures is there, of the text that was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from latentforge.cli.bench import app


def test_it_measures_as_much_text_as_was_asked_and_says_the_same_in_json(tmp_path: Path) -> None:
    corpus = tmp_path / "a.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"text {n} " + "the other, " * 200}) + "\n" for n in range(900)))
    asked = ["data", str(corpus), "--vocab-size", "270", "--megabytes", "1"]
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert found["megabytes"] == pytest.approx(1.0, rel=0.01)
    assert found["tokens"] > 10_000
    assert found["slow_because"] is None
    assert all(found[name] > 0 for name in ("index_mb_s", "encode_mb_s", "mb_s_a_core", "library_mb_s"))
    text = CliRunner().invoke(app, asked).stdout
    assert "read, encode, pack, write" in text
    assert "1.0 MB of text" in text
