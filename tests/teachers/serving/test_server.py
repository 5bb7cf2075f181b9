"""A local server: it counts as started when it scores, and as stopped when nothing of it is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dispatch.agent.processes import look
from latentforge.errors import CrashedError, RefusedError
from latentforge.teachers.serving.processes import KeptProcess, members
from latentforge.teachers.serving.server import VLLMServer, post
from latentforge.teachers.serving.settings import ServingSettings

from .conftest import Stub, gone, wait_until


def _started(settings: ServingSettings, stub: Stub, mode: str = "good", grace: float = 20.0) -> VLLMServer:
    # What other tests take meanwhile is no concern of these.
    return VLLMServer.start(settings, log=stub.log, env=stub.behaving(mode), grace=grace, memory_seconds=0.0)


def test_a_started_server_answers_and_a_stopped_one_leaves_no_process(settings: ServingSettings, stub: Stub) -> None:
    with _started(settings, stub) as server:
        body = {"model": "tiny", "prompt": [1, 2], "max_tokens": 1, "prompt_logprobs": 1}
        assert len(post(f"{server.url}/completions", body, timeout=30.0)["choices"][0]["prompt_logprobs"]) == 2
        assert server.ended() is None
        pids = stub.pids
        assert len(pids) == 3
        assert not any(gone(pid, seconds=0.0) for pid in pids)
    assert all(gone(pid, seconds=0.0) for pid in pids)
    assert server.stopped is not None
    assert server.stopped.ended.asked


def test_a_server_that_ignores_sigterm_is_killed_after_its_grace(settings: ServingSettings, stub: Stub) -> None:
    server = _started(settings, stub, "stubborn", grace=0.2)
    stopped = server.stop()
    assert stopped.ended.signal == signal.SIGKILL
    assert all(gone(pid, seconds=0.0) for pid in stub.pids)
    assert server.stop() is stopped


@pytest.mark.parametrize(
    ("mode", "reason"),
    [("unable", "EngineCore encountered an issue"), ("nan", "not finite"), ("no-logprobs", "no log-probabilities")],
)
def test_a_server_that_listens_and_cannot_score_is_not_started(
    settings: ServingSettings, stub: Stub, mode: str, reason: str
) -> None:
    with pytest.raises(CrashedError, match=reason):
        _started(settings, stub, mode)
    assert len(stub.pids) == 3
    assert all(gone(pid, seconds=0.0) for pid in stub.pids)


def test_a_server_that_dies_at_its_start_is_shown_by_its_last_lines(settings: ServingSettings, stub: Stub) -> None:
    with pytest.raises(CrashedError) as caught:
        _started(settings, stub, "dies")
    message = str(caught.value)
    assert "ended with exit code 3 before it answered" in message
    assert "ValueError: the model does not fit" in message
    assert "line 39" in message
    assert "line 3\n" not in message
    assert caught.value.next == f"less {stub.log}"
    assert all(gone(pid, seconds=0.0) for pid in stub.pids)


def test_a_server_that_never_answers_is_given_up(settings: ServingSettings, stub: Stub) -> None:
    with pytest.raises(CrashedError, match="did not answer within 1 s"):
        VLLMServer.start(settings, log=stub.log, env=stub.behaving("silent"), seconds=1.0, memory_seconds=0.0)
    assert all(gone(pid, seconds=0.0) for pid in stub.pids)


def test_a_server_that_dies_later_is_told_with_its_last_lines(settings: ServingSettings, stub: Stub) -> None:
    with _started(settings, stub) as server:
        with suppress(OSError):
            post(f"{server.url}/completions", {"die": True, "prompt": []}, timeout=30.0)
        ended = server.kept.wait(60.0)
        assert ended is not None
        assert ended.code == 9
        assert not ended.asked
        # Its engine would hold the memory of the model.
        assert all(gone(pid, seconds=0.0) for pid in stub.pids)
        with pytest.raises(CrashedError, match="the last thing that it says"):
            server.check_alive()


def test_a_port_that_is_taken_is_refused_before_anything_starts(settings: ServingSettings, stub: Stub) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RefusedError, match=f"port {port} "):
            VLLMServer.start(settings, log=stub.log, port=port, env=stub.behaving("good"))
    assert not stub.log.exists()


def test_a_folder_that_is_no_model_and_an_environment_without_vllm_are_refused(
    settings: ServingSettings, stub: Stub, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=r"has no config\.json"):
        _started(replace(settings, folder=tmp_path), stub)
    with pytest.raises(RefusedError, match="has no vllm"):
        _started(replace(settings, environment=Path(sys.prefix)), stub)
    with pytest.raises(RefusedError, match="is no Python environment"):
        _started(replace(settings, environment=tmp_path), stub)
    assert not stub.log.exists()


def test_a_keeper_that_is_killed_leaves_nothing_when_the_server_is_stopped(
    settings: ServingSettings, stub: Stub
) -> None:
    with _started(settings, stub) as server:
        os.kill(server.kept.session, signal.SIGKILL)
        # The inner one ends everything without being told; whoever stops the server then waits for that.
        assert gone(server.kept.pid)
        server.stop()
        assert all(gone(pid, seconds=0.0) for pid in stub.pids)


def test_without_a_keeper_the_engine_outlives_its_server(settings: ServingSettings, stub: Stub) -> None:
    """The planted control: what the tests above would see, were the server started as any process is."""
    environment = stub.behaving("good")
    with open(stub.log, "ab") as log:
        server = subprocess.Popen(settings.server_command(1), env=environment, stderr=log)
    wait_until(lambda: len(stub.pids) == 3)
    server.kill()
    server.wait()
    assert not any(gone(pid, seconds=0.0) for pid in stub.pids[1:])


def test_a_process_whose_first_thread_has_ended_is_there_until_its_others_have() -> None:
    program = """
import ctypes, sys, threading
threading.Thread(target=sys.stdin.read, daemon=True).start()
ctypes.CDLL(None).pthread_exit(None)
"""
    with subprocess.Popen([sys.executable, "-c", program], start_new_session=True, stdin=subprocess.PIPE) as process:
        wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        assert members(process.pid) == [process.pid]
        seen = look(process.pid)
        assert seen is not None
        assert (seen.state, seen.alive) == ("Z", True), "to the agent that looks after a run's processes, too"
        assert process.stdin is not None
        process.stdin.close()
        assert gone(process.pid)
        assert members(process.pid) == []


def test_whoever_is_interrupted_while_a_keeper_is_started_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a signal does it: in the main thread, between the fork of the keeper and its first word."""
    started: list[int] = []
    fork = subprocess.Popen

    def forked(*arguments: Any, **named: Any) -> Any:
        process = fork(*arguments, **named)
        started.append(process.pid)
        os.kill(os.getpid(), signal.SIGUSR1)  # before whoever asked is told of the process
        return process

    monkeypatch.setattr(subprocess, "Popen", forked)
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            KeptProcess.start(["sleep", "600"], log=tmp_path / "log", environment=os.environ)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(started) == 1
    assert gone(started[0], seconds=0.0)
    assert members(started[0]) == []
