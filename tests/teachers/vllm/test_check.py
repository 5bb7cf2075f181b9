"""`teacher check` before a real vLLM: what it says of a sound one, and every way of failing told apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentforge.cli import main
from latentforge.data.tokenizer import Tokenizer
from latentforge.spec.sections import TeacherSpec
from latentforge.teachers.checking import check_served
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.findings import Report
from latentforge.teachers.http.openai import OpenAITeacher

from ..proxy import (
    CollapsedKeys,
    Cut,
    Fault,
    FaultProxy,
    FewerThanK,
    Hang,
    Malformed,
    NoLogprobs,
    NotFinite,
    RateLimited,
    ServerError,
    ShiftedEcho,
    Status,
    WrongIds,
)

KEY = "planted-key-0123456789"


def checked(url: str, folder: Path | None, *, k: int = 20, timeout: float = 60.0, model: str | None = "tiny") -> Report:
    spec = TeacherSpec(backend="openai", url=url, served_model=model, timeout=timeout)
    return check_served(spec, folder, {}, k=k, requests=2)


def test_a_sound_server_passes_and_shows_what_it_can_do(
    vllm_url: str, served_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        [
            "teacher",
            "check",
            "--url",
            vllm_url,
            "--tokenizer",
            str(served_folder),
            "--k",
            "50",
            "--requests",
            "4",
            "--json",
        ]
    )
    found = json.loads(capsys.readouterr().out)
    assert (code, found["ok"], found["kind"], found["exit_code"]) == (0, True, None, 0)
    assert {one["step"]: one["state"] for one in found["steps"]} == dict.fromkeys(
        ("models", "model", "score", "position", "tokenizer", "latency"), "pass"
    )
    figures = found["figures"]
    assert figures["finite"] == 50 * figures["positions"]
    assert (figures["max_k"], figures["form"], figures["requests"]) == (320, "prompt_logprobs", 4)
    assert 0 < figures["p50_s"] <= figures["p95_s"]
    assert figures["tokens_per_s"] > 0
    capabilities = {name: (one["declared"], one["probed"]) for name, one in found["capabilities"].items()}
    assert capabilities == {
        "score": (True, True), "sample": (True, True), "logits": (False, False), "chat": (True, True),
    }  # fmt: skip
    assert "top-20 rows" in found["capabilities"]["chat"]["said"]
    assert found["capabilities"]["sample"]["said"] == "several chunks a prompt, as ids (token_ids)"


@pytest.mark.parametrize(
    ("fault", "kind", "code", "said"),
    [
        (RateLimited(retry_after=600), "rate-limited", 1, "429"),
        (ServerError(503), "server-error", 1, "503"),
        (Status(401, "Incorrect API key"), "unauthorized", 6, "401"),
        (Status(404, "no such path"), "model-not-found", 2, "404"),
        (Hang(), "timeout", 1, "no whole answer within 3 s"),
        (Cut(), "cut", 1, "in the middle"),
        (FewerThanK(2), "too-few", 1, "3 were asked"),
        (ShiftedEcho(), "shifted", 1, "position"),
        (WrongIds(), "wrong-ids", 1, "position"),
        (NotFinite(), "not-finite", 1, "nan"),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else None,
)
def test_each_way_of_failing_is_told_apart_with_what_to_do(
    proxy: FaultProxy, served_folder: Path, fault: Fault, kind: str, code: int, said: str
) -> None:
    proxy.script([fault])
    report = checked(proxy.url, served_folder, timeout=3.0 if isinstance(fault, Hang) else 60.0)
    (failed,) = [one for one in report.findings if one.state == "fail"]
    assert (failed.step, failed.kind, int(report.code)) == ("score", kind, code), failed.said
    assert said in failed.said
    assert failed.next
    # Asked once: a check waits for nothing, and hides nothing behind a second try.
    assert proxy.outcomes.count(fault.name) == 1


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (NoLogprobs(), "no-logprobs", "vLLM"),
        (CollapsedKeys(), "collapsed", "vLLM"),
        (Malformed("<html><body>Welcome</body></html>"), "malformed", "teacher check"),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else None,
)
def test_a_server_that_answers_neither_form_of_question_is_no_scorer(
    proxy: FaultProxy, served_folder: Path, fault: Fault, kind: str, said: str
) -> None:
    proxy.script([fault, fault])  # either form of question
    report = checked(proxy.url, served_folder)
    assert (report.kind, int(report.code)) == (kind, 1)
    (failed,) = [one for one in report.findings if one.state == "fail"]
    assert said in str(failed.next)
    assert {one.name: one.probed for one in report.abilities}["score"] is False


def test_more_entries_than_the_server_gives_are_too_few(vllm_url: str, served_folder: Path) -> None:
    report = checked(vllm_url, served_folder, k=321)
    assert (report.kind, int(report.code)) == ("too-few", 1)
    assert "--k 320" in str(next(one.next for one in report.findings if one.state == "fail"))


def test_a_model_that_is_not_there_is_refused_with_those_that_are(vllm_url: str, served_folder: Path) -> None:
    report = checked(vllm_url, served_folder, model="tinny")
    assert (report.kind, int(report.code)) == ("model-not-found", 2)
    (failed,) = [one for one in report.findings if one.state == "fail"]
    assert "tiny" in failed.said
    assert failed.next == "--model tiny"


def test_a_key_is_sent_where_its_name_is_given_and_shown_nowhere(
    vllm_url: str, served_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_API_KEY", KEY)
    with FaultProxy(vllm_url, key=KEY) as hosted:
        asked = ["teacher", "check", "--url", hosted.url, "--tokenizer", str(served_folder), "--requests", "1"]
        assert main(asked) == 6
        refused = capsys.readouterr()
        assert "[unauthorized]" in refused.out
        assert "teacher.api_key_env" in refused.out
        assert main([*asked, "--key-env", "MY_API_KEY"]) == 0
        passed = capsys.readouterr()
    assert all(KEY not in text for text in (refused.out, refused.err, passed.out, passed.err))


def test_the_path_one_level_above_the_api_is_told_with_the_right_one(vllm_url: str, served_folder: Path) -> None:
    report = checked(vllm_url.removesuffix("/v1"), served_folder)
    assert (report.kind, int(report.code)) == ("model-not-found", 2)
    assert f"--url {vllm_url}" in str(report.findings[0].next)


def test_another_tokenizer_is_found_by_what_the_server_reads(
    vllm_url: str, served_folder: Path, tmp_path: Path
) -> None:
    """Control: the same vocabulary with two merges in the other order reads some texts differently."""
    other = tmp_path / "other"
    other.mkdir()
    for file in served_folder.iterdir():
        if file.suffix == ".json":
            (other / file.name).write_bytes(file.read_bytes())
    content = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][::-1]
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    report = checked(vllm_url, other)
    (failed,) = [one for one in report.findings if one.state == "fail"]
    assert (failed.step, int(report.code)) == ("tokenizer", 1)
    assert Tokenizer.open(other).sha256[:12] in failed.said
    # A run is told the same before it asks for a document.
    teacher = OpenAITeacher.open(vllm_url, "tiny", other)
    with pytest.raises(TeacherFailure, match="another tokenizer"):
        _ = teacher.facts
    teacher.close()


def test_where_tokenize_is_not_offered_ids_are_sent_and_their_echo_is_read(
    proxy: FaultProxy, served_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = proxy.ask

    def refuse(method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        return (404, {}, b'{"detail":"Not Found"}') if path.endswith("/tokenize") else ask(method, path, body, headers)

    monkeypatch.setattr(proxy, "ask", refuse)
    report = checked(proxy.url, served_folder)
    (step,) = [one for one in report.findings if one.step == "tokenizer"]
    assert step.state == "pass"
    assert "spell" in step.said
