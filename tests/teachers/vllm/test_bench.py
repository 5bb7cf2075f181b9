"""`bench teachers`: a hosted API with a key, a local and a remote vLLM in one table, each document paid for once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from latentforge.cli import main
from latentforge.teachers.http.openai import OpenAITeacher
from latentforge.teachers.serving.processes import members
from latentforge.teachers.serving.server import VLLMServer

from ..proxy import Fault, FaultProxy, NoLogprobs, RateLimited, ServerError

KEY = "planted-key-0123456789"
TITLES = ("hosted API", "local vLLM", "remote vLLM")


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", KEY)


def rows(shown: str) -> dict[str, dict[str, str]]:
    """The table by scenario and column."""
    lines = shown.splitlines()
    at = next(number for number, line in enumerate(lines) if line.lstrip().startswith("scenario"))
    head = lines[at].split()
    assert tuple(line[2:].split("  ")[0] for line in lines[at + 1 : at + 4]) == TITLES
    # Only a title and a size hold a blank.
    cells = [line.replace(" kB", "_kB").replace(" ms", "_ms").split() for line in lines[at + 1 : at + 4]]
    return {title: dict(zip(head, [title, *line[2:]], strict=True)) for title, line in zip(TITLES, cells, strict=True)}


def test_a_hosted_api_a_local_and_a_remote_vllm_stand_in_one_table_of_one_command(
    vllm_url: str,
    vllm_environment: Path,
    served_folder: Path,
    surroundings: Mapping[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[VLLMServer] = []
    start = VLLMServer.start

    def started_here(settings: Any, **how: Any) -> VLLMServer:
        # What other tests hold of the memory meanwhile is no concern of this one.
        started.append(start(settings, **{**how, "memory_seconds": 0.0}))
        return started[-1]

    monkeypatch.setattr(VLLMServer, "start", started_here)
    monkeypatch.setenv("LATENTFORGE_VLLM_ENVIRONMENT", str(vllm_environment))
    for name in ("VLLM_CACHE_ROOT", "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, surroundings[name])
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    with FaultProxy(vllm_url, key=KEY, delay=0.05) as hosted, FaultProxy(vllm_url) as remote:
        with closing(OpenAITeacher.open(remote.url, "tiny", served_folder)) as teacher:
            assert teacher.facts  # what is asked before the first document
        before = len(remote.outcomes)
        remote.forget()
        hosted.script([*[Fault()] * before, RateLimited(retry_after="0.05"), Fault(), ServerError()])
        where = ["--hosted", hosted.url, "--hosted-key-env", "MY_API_KEY", "--remote", remote.url, "--model", "tiny"]
        local = ["--local", str(served_folder)]  # its tokenizer is everybody's
        assert main(["bench", "teachers", *where, *local, "--documents", "6", "--tokens", "24"]) == 0
        said = capsys.readouterr()
    assert KEY not in said.out + said.err
    found = rows(said.out)
    (server,) = started
    assert members(server.kept.session) == [], "the vLLM of its own is stopped"
    for proxy, title in ((hosted, "hosted API"), (remote, "remote vLLM")):
        documents = Counter(one for one in proxy.documents if len(one) == 24)
        assert len(documents) == 6
        assert set(documents.values()) == {1}, "each document is asked once, though the store is read after it"
        assert found[title]["requests"] == str(len(proxy.requests))
        assert found[title]["429s"] == str(proxy.outcomes.count("429"))
        assert found[title]["errors"] == str(proxy.outcomes.count("503"))
    assert {request.key for request in hosted.requests} == {KEY}
    assert {request.key for request in remote.requests} == {None}
    assert [found[title]["k"] for title in TITLES] == ["10–20", "20", "20"]
    assert [found[title]["errors"] for title in TITLES] == ["1", "0", "0"]
    # 24 tokens and a generated one of each document, and the short questions of all three alike.
    charged = {int(row["tokens"]) for row in found.values()}
    assert len(charged) == 1
    assert 6 * 25 < charged.pop() < 6 * 25 + 60
    for row in found.values():
        assert (row["capability"], row["hits"], row["verdict"]) == ("score", "50%", "pass")
        assert int(row["tokens/s"]) > 0
        assert 0 < int(row["p50"].removesuffix("_ms")) <= int(row["p95"].removesuffix("_ms"))
    assert int(found["hosted API"]["p50"].removesuffix("_ms")) >= 50, "the delay of the API is in its latency"
    (first,) = [line for line in said.out.splitlines() if "is the fastest with" in line]
    speeds = {title: int(row["tokens/s"]) for title, row in found.items()}
    assert first.strip().startswith(max(speeds, key=lambda title: speeds[title]))
    assert "  hosted API: failed attempts: 1 x server-error" in said.out
    assert f"a vLLM of its own (answered after {server.seconds_to_start:.0f} s" in said.out


def test_a_scenario_that_fails_is_a_row_with_its_reason_and_the_others_are_measured(
    vllm_url: str, served_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", f"not-{KEY}")
    command = ["bench", "teachers", "--tokenizer", str(served_folder), "--documents", "4", "--tokens", "24"]
    with FaultProxy(vllm_url, key=KEY) as hosted, FaultProxy(vllm_url) as silent:
        silent.script([NoLogprobs()] * 20)
        where = ["--hosted", hosted.url, "--hosted-key-env", "MY_API_KEY", "--local", vllm_url, "--remote", silent.url]
        assert main([*command, *where, "--json"]) == 1
        said = capsys.readouterr()
        told = json.loads(said.out)
        assert told["exit_code"] == 1
        found = {one["scenario"]: one for one in told["scenarios"]}
        assert {name: one["verdict"] for name, one in found.items()} == {
            "hosted": "fail",
            "local": "pass",
            "remote": "fail",
        }
        assert len({tuple(one) for one in found.values()}) == 1, "the same names whatever came of it"
        assert "[unauthorized]" in found["hosted"]["said"]
        assert "MY_API_KEY" in found["hosted"]["next"]
        assert KEY not in said.out + said.err
        assert "[no-logprobs]" in found["remote"]["said"]
        assert found["remote"]["tokens_per_s"] is None
        assert found["remote"]["p50_s"] is None
        assert found["remote"]["requests"] == len(silent.requests) - 1, "one of them asked for the model's name"
        local = found["local"]
        assert (local["hit_rate"], local["asked_again"], local["rows_from_store"]) == (0.5, 0, 4)
    assert main([*command, "--local", vllm_url, "--tokens", "4000"]) == 1
    said = capsys.readouterr()
    assert "documents of 4000 tokens are longer than its" in said.out
    assert "next: --tokens" in said.out
    assert said.out.count("not configured") == 2
    assert "VLLM_REMOTE_URL" in said.out


def test_a_hosted_api_that_only_chats_is_measured_by_its_answers_several_at_once(
    vllm_url: str, served_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENICE_API_KEY", KEY)
    monkeypatch.setenv("VENICE_MODEL", "tiny")
    with FaultProxy(vllm_url, key=KEY, delay=0.2) as hosted:
        monkeypatch.setenv("VENICE_BASE_URL", hosted.url)
        assert main(["bench", "teachers", "--tokenizer", str(served_folder), "--documents", "8", "--json"]) == 3
        (found, *_) = json.loads(capsys.readouterr().out)["scenarios"]
        asked = [request.path for request in hosted.requests]
        assert hosted.most_in_flight > 1
    assert asked == ["/v1/chat/completions"] * 8, "no chat is paid for twice"
    assert (found["capability"], found["verdict"], found["hit_rate"]) == ("chat", "pass", 0.5)
    # An answer that cannot be used is paid for, kept and counted, as in a pipeline.
    assert found["documents"] + sum(found["failures"].values()) == 8
    assert found["documents"] <= found["tokens"] <= found["documents"] * 16
    assert found["p50_s"] >= 0.2
