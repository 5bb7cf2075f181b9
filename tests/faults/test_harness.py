"""The harness itself: a fault that is injected is there, and what is left behind is seen."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Make = Callable[..., Any]


def test_a_wire_that_is_cut_carries_nothing_and_carries_again_when_it_is_whole(wire: Make, sshd_here: Make) -> None:
    link = wire()
    server = sshd_here(wire=link)
    with socket.create_connection((server.address, 22), timeout=5) as peer:
        assert peer.recv(64).startswith(b"SSH-2.0")
    link.cut()
    with pytest.raises(TimeoutError):
        socket.create_connection((server.address, 22), timeout=0.5)
    link.restore()
    with socket.create_connection((server.address, 22), timeout=5) as peer:
        assert peer.recv(64).startswith(b"SSH-2.0")


def test_a_slow_wire_is_slow(wire: Make, eventually: Make) -> None:
    link = wire()
    program = "import socket; s = socket.create_server(('', 9)); c, _ = s.accept(); c.sendall(bytes(60_000)); c.close()"
    server = subprocess.Popen([*link.prefix, sys.executable, "-I", "-c", program])
    try:
        link.slow(400)
        peer = eventually(lambda: _connected(link.host), "it listens")
        begin = time.monotonic()
        size = 0
        with peer:
            while chunk := peer.recv(65536):
                size += len(chunk)
        assert size == 60_000
        assert time.monotonic() - begin > 0.8, "60 kB at 50 kB/s"
    finally:
        server.kill()
        server.wait()


def _connected(address: str) -> socket.socket | None:
    try:
        return socket.create_connection((address, 9), timeout=5)
    except OSError:
        return None


def test_a_login_shell_and_a_home_are_the_server_s_own(sshd_here: Make, tmp_path: Path) -> None:
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/sh\necho "shell in $HOME, asked $2"\n')
    shell.chmod(0o755)
    server = sshd_here(shell=str(shell))
    said = subprocess.run(
        [
            *("ssh", "-F", "none", "-i", str(server.key), "-p", str(server.port), "-o", "StrictHostKeyChecking=no"),
            *("-o", "UserKnownHostsFile=/dev/null", "127.0.0.1", "anything"),
        ],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert said.stdout == f"shell in {server.folder}/home, asked anything\n", said.stderr


def test_what_a_test_leaves_behind_is_seen(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    seen = _harness(request)
    (tmp_path / "locks").mkdir()
    folder = subprocess.Popen(["sleep", "100"], cwd=tmp_path)
    environment = subprocess.Popen(["sleep", "100"], cwd="/", env={"HOME": str(tmp_path)})
    (tmp_path / "locks/device.lock").touch()
    try:
        assert {folder.pid, environment.pid} <= set(seen["strays"](tmp_path))
        with open(tmp_path / "locks/device.lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert seen["held_locks"](tmp_path) == [str(tmp_path / "locks/device.lock")]
        assert seen["held_locks"](tmp_path) == []
        (tmp_path / ".tmp-exit-1-abcd").touch()
        assert seen["temporaries"](tmp_path) == [str(tmp_path / ".tmp-exit-1-abcd")]
        (tmp_path / ".tmp-exit-1-abcd").unlink()
    finally:
        for process in (folder, environment):
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    assert seen["strays"](tmp_path) == {}


def _harness(request: pytest.FixtureRequest) -> dict[str, Any]:
    conftest = Path(__file__).with_name("conftest.py")
    for plugin in request.config.pluginmanager.get_plugins():
        if getattr(plugin, "__file__", None) == str(conftest):
            return vars(plugin)
    raise AssertionError("the harness is not loaded")
