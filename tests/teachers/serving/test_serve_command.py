"""`latentforge teacher serve`: however it ends, nothing of vLLM outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from latentforge.cli import main
from latentforge.teachers.serving.processes import default_log, prepare_log

from .conftest import SECONDS, Stub, gone


def _command(folder: Path, environment: Path, stub: Stub, *more: str) -> list[str]:
    command = [sys.executable, "-m", "latentforge", "teacher", "serve", str(folder), "--port", "0", "--json"]
    command += ["--memory-timeout", "0"]
    return [*command, "--environment", str(environment), "--log", str(stub.log), *more]


def _line(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    return json.loads(line) if line else None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_ends_the_server_and_all_below_it(
    teacher_folder: Path, stub_environment: Path, stub: Stub, number: signal.Signals
) -> None:
    command = _command(teacher_folder, stub_environment, stub)
    with subprocess.Popen(command, env=stub.behaving("good"), stdout=subprocess.PIPE, text=True) as process:
        serving = _line(process)
        assert serving["state"] == "serving"
        assert serving["url"].startswith("http://127.0.0.1:")
        assert serving["max_model_len"] == 64
        assert len(stub.pids) == 3
        process.send_signal(number)
        assert all(gone(pid) for pid in stub.pids)
        stopped = _line(process)
        code = process.wait(SECONDS)
    if number == signal.SIGKILL:
        assert (stopped, code) == (None, -signal.SIGKILL)
        return
    assert stopped["state"] == "stopped"
    assert stopped["asked"]
    assert code == (0 if stopped["memory_returned"] else 1)


@pytest.mark.parametrize("killed", ["command and outer keeper", "command and inner keeper"])
def test_a_keeper_killed_with_its_command_leaves_no_process_of_the_server(
    teacher_folder: Path, stub_environment: Path, stub: Stub, killed: str
) -> None:
    command = _command(teacher_folder, stub_environment, stub)
    with subprocess.Popen(command, env=stub.behaving("good"), stdout=subprocess.PIPE, text=True) as process:
        assert _line(process)["state"] == "serving"
        (outer,) = _children(process.pid)
        (inner,) = _children(outer)
        dying = {"command and outer keeper": [process.pid, outer], "command and inner keeper": [process.pid, inner]}
        for number in (signal.SIGSTOP, signal.SIGKILL):  # none of them sees another die
            for pid in dying[killed]:
                os.kill(pid, number)
        assert all(gone(pid) for pid in stub.pids), "its engine was left with the memory of the model"
        assert gone(inner)
        assert gone(outer)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_signal_during_the_start_ends_it(teacher_folder: Path, stub_environment: Path, stub: Stub) -> None:
    command = [part for part in _command(teacher_folder, stub_environment, stub) if part != "--json"]
    with subprocess.Popen(command, env=stub.behaving("silent"), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "starts vLLM" in process.stdout.readline()
        process.terminate()
        assert process.wait(SECONDS) == 0
    assert all(gone(pid, seconds=0.0) for pid in stub.pids)


def test_a_server_that_ends_by_itself_is_an_error(
    teacher_folder: Path,
    stub_environment: Path,
    stub: Stub,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STUB", "dies")
    monkeypatch.setenv("STUB_PIDS", str(stub.file))
    assert main(_command(teacher_folder, stub_environment, stub)[3:]) == 5
    assert "ValueError: the model does not fit" in capfd.readouterr().err


def test_what_cannot_be_served_is_refused_with_the_way_out(
    teacher_folder: Path, stub_environment: Path, stub: Stub, capfd: pytest.CaptureFixture[str]
) -> None:
    def refusal(*more: str) -> str:
        assert main(_command(teacher_folder, stub_environment, stub, *more)[3:]) == 2
        return capfd.readouterr().err

    assert "--max-model-len 64" in refusal("--max-model-len", "65")
    assert "--utilisation 1.5" in refusal("--utilisation", "1.5")
    assert "--dtype 'nonsense'" in refusal("--dtype", "nonsense")
    assert "cannot be written: Not a directory" in refusal("--log", str(teacher_folder / "config.json" / "x.log"))
    assert "cannot be written: Is a directory" in refusal("--log", str(teacher_folder))
    assert stub.pids == []


def test_the_variables_of_a_dotenv_set_what_nothing_nearer_sets(
    teacher_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("LATENTFORGE_VLLM_ENVIRONMENT", "VLLM_MAX_MODEL_LEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".env").write_text("LATENTFORGE_VLLM_ENVIRONMENT=/nowhere/vllm\nVLLM_MAX_MODEL_LEN=65\n")

    def refusal(*more: str) -> str:
        assert main(["teacher", "serve", str(teacher_folder), "--port", "0", *more]) == 2
        return capfd.readouterr().err

    assert "--max-model-len 65" in refusal()
    assert "environment /nowhere/vllm" in refusal("--max-model-len", "64")
    monkeypatch.setenv("VLLM_MAX_MODEL_LEN", "66")
    assert "--max-model-len 66" in refusal()


def test_a_log_of_its_own_leaves_the_state_folder_to_its_owner(tmp_path: Path) -> None:
    """A host whose state others may read takes no run: whoever served a teacher before was refused from then on."""
    before = os.umask(0o022)
    try:
        log = default_log("org/model", {"XDG_STATE_HOME": str(tmp_path / "state")})
        prepare_log(log)
    finally:
        os.umask(before)
    assert log.parent == tmp_path / "state" / "latentforge" / "teachers"
    assert log.parent.parent.stat().st_mode & 0o777 == 0o700
