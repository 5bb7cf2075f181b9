"""Secrets never enter evidence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentforge.errors import RefusedError
from latentforge.evidence.checks import planted_run
from latentforge.evidence.secrets import DENIED_NAME, refuse_secret_files, refuse_secrets
from latentforge.evidence.statement import build_statement

VALUE = "planted-credential-0123456789"


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "GITHUB_TOKEN", "VENICE_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "MY_KEY",
     "GOOGLE_APPLICATION_CREDENTIALS", "SSH_PASSPHRASE", "TOKEN", "GH_PAT"],
)  # fmt: skip
def test_names_of_credentials_are_denied(name: str) -> None:
    assert DENIED_NAME.search(name)


@pytest.mark.parametrize(
    "name", ["PATH", "STEPS", "TOKENIZERS_PARALLELISM", "SSH_AUTH_SOCK", "KEYBOARD", "T", "ALPHA", "PATIENCE"]
)
def test_ordinary_names_are_not_denied(name: str) -> None:
    assert not DENIED_NAME.search(name)


@pytest.mark.parametrize(
    "value",
    [
        {"env": {"HF_TOKEN": "short"}},
        {"deep": [{"argv": ["--auth", f"Bearer {VALUE}"]}]},
        {"dispatched": {f"x{VALUE}": 1}},
    ],
)
def test_a_value_of_a_denied_variable_is_refused_without_being_shown(value: dict[str, object]) -> None:
    with pytest.raises(RefusedError) as caught:
        refuse_secrets(value, "launch", {"HF_TOKEN": VALUE})
    assert "HF_TOKEN" in str(caught.value)
    assert VALUE not in str(caught.value)


def test_words_of_the_trade_are_not_secrets() -> None:
    refuse_secrets({"tokens_per_second": "9", "eos_token": "<|end|>", "key": "value", "HF_TOKEN": ""}, "x", {})


def test_a_secret_across_a_block_border_is_found(tmp_path: Path) -> None:
    border = (1 << 20) - 5
    (tmp_path / "launch.log").write_bytes(b"." * border + VALUE.encode() + b"." * 100)
    with pytest.raises(RefusedError, match=r"launch\.log"):
        refuse_secret_files(tmp_path, ["launch.log"], {"API_KEY": VALUE})
    refuse_secret_files(tmp_path, ["launch.log"], {"GREETING": VALUE})


def test_a_launch_record_with_a_token_stops_the_statement(tmp_path: Path) -> None:
    run_dir = planted_run(tmp_path)
    text = (run_dir / "launch.json").read_text().replace('"env": {}', f'"env": {{"X": "{VALUE}"}}')
    (run_dir / "launch.json").write_text(text)
    with pytest.raises(RefusedError, match=r"HF_TOKEN stands in launch\.json"):
        build_statement(run_dir, plan=None, host={}, dispatched={}, environ={"HF_TOKEN": VALUE})


@pytest.mark.parametrize("value", ['a"planted\\value/0123', "clé-planted-0123"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_secret_that_json_escapes_is_found_in_a_file(tmp_path: Path, value: str, ascii_only: bool) -> None:
    (tmp_path / "effective.json").write_text(json.dumps({"note": value}, ensure_ascii=ascii_only))
    with pytest.raises(RefusedError, match=r"HF_TOKEN stands in effective\.json"):
        refuse_secret_files(tmp_path, ["effective.json"], {"HF_TOKEN": value})
