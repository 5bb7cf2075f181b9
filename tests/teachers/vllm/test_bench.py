"""`bench teachers`: a hosted API with a key, a local and a remote vLLM in one table, each document paid for once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentforge.cli import main

from ..proxy import FaultProxy, NoLogprobs, RateLimited

KEY = "planted-key-0123456789"


def asked(hosted: str, local: str, remote: str, folder: Path, *more: str) -> list[str]:
    where = ["--hosted", hosted, "--hosted-key-env", "MY_API_KEY", "--local", local, "--remote", remote]
    return ["bench", "teachers", *where, "--tokenizer", str(folder), "--documents", "6", "--tokens", "24", *more]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", KEY)


def test_three_scenarios_stand_in_one_table_and_pay_for_each_document_once(
    vllm_url: str, served_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FaultProxy(vllm_url, key=KEY) as hosted, FaultProxy(vllm_url) as remote:
        hosted.script([RateLimited(retry_after="0.05")])
        assert main(asked(hosted.url, vllm_url, remote.url, served_folder, "--json")) == 0
        found = {one["scenario"]: one for one in json.loads(capsys.readouterr().out)["scenarios"]}
        assert main(asked(hosted.url, vllm_url, remote.url, served_folder)) == 0
        shown = capsys.readouterr().out
        documents = [one for one in remote.documents if len(one) == 24]
        assert len(documents) == 2 * len(set(documents)) == 12, "each of the two commands asks each document once"
    assert list(found) == ["hosted", "local", "remote"]
    for name, one in found.items():
        assert (one["verdict"], one["hit_rate"], one["asked_again"]) == ("pass", 0.5, 0), one
        assert one["rows_from_store"] == 6
        assert one["store_bytes"] > 0
        assert one["tokens_per_s"] > 0
        assert 0 < one["p50_s"] <= one["p95_s"]
        assert one["rate_limit_events"] == (1 if name == "hosted" else 0)
    for title in ("scenario", "hosted API, with a key", "local vLLM", "remote vLLM", "429s", "store", "verdict"):
        assert title in shown
    assert KEY not in shown


def test_a_scenario_that_fails_or_is_not_configured_is_never_a_pass(
    vllm_url: str, served_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(vllm_url) as silent:
        silent.script([NoLogprobs()] * 20)
        assert main(asked(vllm_url, vllm_url, silent.url, served_folder)) == 1
    said = capsys.readouterr().out
    assert "[no-logprobs]" in said
    assert main(["bench", "teachers", "--local", vllm_url, "--tokenizer", str(served_folder), "--documents", "2"]) == 3
    said = capsys.readouterr().out
    assert said.count("unknown") == 2
    assert "VLLM_REMOTE_URL" in said
    assert "VENICE_API_KEY" in said
