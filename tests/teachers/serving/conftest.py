"""Environments whose vLLM is a stub, and a way to see that processes are gone."""

from __future__ import annotations

import os
import select
import shutil
import signal
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from latentforge.teachers.serving.settings import ServingSettings

SECONDS = 60.0
Gone = Callable[[int], bool]


@pytest.fixture(scope="session")
def stub_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with a package ``vllm`` that is a stub."""
    environment = tmp_path_factory.mktemp("environment") / "vllm"
    venv.create(environment, symlinks=True)
    package = next(environment.glob("lib/python*/site-packages")) / "vllm"
    (package / "entrypoints" / "openai").mkdir(parents=True)
    for folder in (package, package / "entrypoints", package / "entrypoints" / "openai"):
        (folder / "__init__.py").touch()
    shutil.copy(Path(__file__).parent / "stub_vllm.py", package / "entrypoints" / "openai" / "api_server.py")
    return environment


class Stub:
    """How the stub is to behave, and which processes it started."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.log = folder / "server.log"
        self.file = folder / "pids"
        self.environment = {**environment, "STUB_PIDS": str(self.file)}

    def behaving(self, mode: str) -> dict[str, str]:
        """The environment in which it behaves so."""
        return {**self.environment, "STUB": mode}

    @property
    def pids(self) -> list[int]:
        """The server, its engine, and what the engine left alone."""
        return [int(line) for line in self.file.read_text().split()] if self.file.exists() else []


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Stub]:
    """A stub; what a failing test leaves of it is ended here."""
    found = Stub(tmp_path, dict(os.environ))
    yield found
    for pid in found.pids:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def settings(teacher_folder: Path, stub_environment: Path) -> ServingSettings:
    """Settings for the stub."""
    return ServingSettings(folder=teacher_folder, environment=stub_environment, name="tiny")


def gone(pid: int, *, seconds: float = SECONDS) -> bool:
    """Whether a process ends within ``seconds``, told by the kernel."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], seconds)[0])
    finally:
        os.close(fd)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what the kernel does not announce."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.01)
