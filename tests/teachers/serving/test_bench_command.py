"""`latentforge bench teachers`: what it refuses, and that whoever ends it finds nothing of it left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from latentforge.cli import main
from latentforge.spec.sections import TeacherSpec
from latentforge.teachers.scenarios import Figures, Measured, Name, Scenario
from latentforge.teachers.side_by_side import table, worst

from .conftest import SECONDS, Stub, gone

NOWHERE = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_whoever_ends_it_leaves_no_process_of_the_local_vllm_and_no_file(
    teacher_folder: Path, stub_environment: Path, stub: Stub, tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "latentforge", "bench", "teachers", "--local", str(teacher_folder)]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    env = stub.behaving("silent") | {"LATENTFORGE_VLLM_ENVIRONMENT": str(stub_environment), "TMPDIR": str(scratch)}
    piped: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell that runs the tests in the background has them ignore SIGINT; a terminal's command does not.
    noticing = partial(signal.signal, number, signal.SIG_DFL)
    with subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=noticing, **piped) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        assert "local vLLM: starts vLLM" in process.stderr.readline()
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)  # as a terminal does it
        assert process.wait(SECONDS) == 130
        assert "Traceback" not in process.stderr.read()
        assert process.stdout.read() == ""
    assert all(gone(pid, seconds=0.0) for pid in stub.pids)
    assert list(scratch.iterdir()) == []


def test_a_store_that_holds_rows_is_refused_before_anything_is_asked(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "remote.sqlite").touch()
    command = ["bench", "teachers", "--remote", NOWHERE, "--tokenizer", str(teacher_folder), "--store", str(tmp_path)]
    assert main(command) == 2
    said = capsys.readouterr()
    assert "remote.sqlite exists" in said.err
    assert said.out == ""


def test_the_key_of_one_hosted_api_goes_to_no_other(
    teacher_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENICE_API_KEY", "planted-key-0123456789")
    assert main(["bench", "teachers", "--hosted", NOWHERE, "--tokenizer", str(teacher_folder)]) == 2
    assert "--hosted-key-env NAME" in capsys.readouterr().err


def test_an_empty_variable_names_no_scenario(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VENICE_API_KEY", "VLLM_LOCAL_MODEL", "VLLM_REMOTE_URL"):
        monkeypatch.setenv(name, "")
    assert main(["bench", "teachers"]) == 3
    assert capsys.readouterr().out.count("not configured") == 3


def measured(name: Name, speed: float | None, **more: object) -> Measured:
    spec = TeacherSpec(backend="vllm-remote", url=NOWHERE)
    verdict, said = ("fail", "it broke") if speed is None else ("pass", "")
    figures = Figures(tokens_per_s=speed, **{"capability": "score", "k": 20, "requests": 8, **more})  # type: ignore[arg-type]
    return Measured(Scenario(name, spec, None), verdict, said, None, figures)  # type: ignore[arg-type]


def test_the_summary_names_the_fastest_of_those_that_scored_and_of_those_alone() -> None:
    three = [measured("hosted", 100.0), measured("local", 400.0), measured("remote", 300.0)]
    said = "\n".join(table(three))
    assert (
        "local vLLM is the fastest with 400 tokens/s; remote vLLM reaches 75% of that, hosted API reaches 25%" in said
    )
    chats = [measured("hosted", 900.0, capability="chat"), measured("local", 400.0), measured("remote", None)]
    assert "fastest" not in "\n".join(table(chats))
    assert worst(chats) == 1
    assert worst(three) == 0


def test_a_row_shows_the_entries_that_a_rate_limit_left_and_the_failures_by_kind() -> None:
    one = measured("remote", 5.0, k_least=10, failures={"rate-limited": 3, "cut": 2, "timeout": 1}, rate_limit_events=3)
    lines = table([one])
    row = dict(zip(lines[0].split(), lines[1].replace("remote vLLM", "remote-vLLM").split(), strict=True))
    assert (row["k"], row["429s"], row["errors"]) == ("10–20", "3", "3")
    assert "  remote vLLM: failed attempts: 2 x cut, 1 x timeout" in lines
