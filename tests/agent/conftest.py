"""A host for the agent's tests: a state root of its own, real processes, and a check that none is left behind."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dispatch import agent_package
from dispatch.agent import protocol
from dispatch.agent.__main__ import serve
from dispatch.agent.cas import Origin
from dispatch.agent.paths import Root, RunPaths
from dispatch.agent.processes import look

MARK = "LF_TEST_MARK"


class Refusal(Exception):
    """An error reply of the agent."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['kind']}: {error['message']} (next: {error['next']})")
        self.kind: str = error["kind"]
        self.code: int = error["code"]
        self.message: str = error["message"]
        self.next: str | None = error["next"]
        self.detail: dict[str, Any] = error["detail"]


class AgentHost:
    """One state root and the means to ask the agent about it, as a laptop would."""

    def __init__(self, folder: Path) -> None:
        self.dir = folder / "state"
        self.root = Root(str(self.dir))
        self.mark = uuid.uuid4().hex
        self.environment = {**os.environ, MARK: self.mark}
        self.installed = False
        self.prefix: list[str] = []
        """What stands before the agent's command: how to get to this host, where that is not here."""
        self.runner: str | None = None

    def start(self, verb: str, args: dict[str, Any], payload: bytes = b"") -> subprocess.Popen[bytes]:
        """Start one request without waiting for its reply."""
        if verb == "launch" and self.runner is not None:
            args = {"runner": self.runner, **args}
        process = subprocess.Popen(
            [*self.prefix, *agent_package.bootstrap_argv(sys.executable)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment,
        )
        assert process.stdin is not None
        how = agent_package.installed(str(self.dir)) if self.installed else agent_package.carried()
        process.stdin.write(how + protocol.encode_request(verb, root=str(self.dir), args=args, payload=payload))
        process.stdin.close()
        process.stdin = None
        return process

    def finish(self, process: subprocess.Popen[bytes]) -> protocol.Frame:
        """The reply's frame; raises Refusal for an error reply."""
        out, err = process.communicate(timeout=60)
        frame = protocol.find_frame(out)
        assert frame is not None, (out, err)
        assert process.returncode == 0
        assert err == b""
        return _answered(frame)

    def frame(self, verb: str, args: dict[str, Any], payload: bytes = b"") -> protocol.Frame:
        """One request and its frame."""
        return self.finish(self.start(verb, args, payload))

    def call(self, verb: str, **args: Any) -> dict[str, Any]:
        """One request and its result: in a process of its own where that matters, else here, which is faster."""
        if verb in ("install", "launch", "cancel"):
            frame = self.frame(verb, args)
        else:
            request = io.BytesIO(protocol.encode_request(verb, root=str(self.dir), args=args))
            found = protocol.find_frame(serve(request, Origin(agent_package.agent_bytes(), None)))
            assert found is not None
            frame = _answered(found)
        result: dict[str, Any] = frame.document["result"]
        return result

    def launch_of(self, run: str, argv: list[str], **fields: Any) -> dict[str, Any]:
        """A launch description that carries this test's mark."""
        env = {MARK: self.mark, **fields.pop("env", {})}
        return {"run": run, "kin": "kin", "argv": argv, "env": env, "lease": [], **fields}

    def reserve(self, argv: list[str], kind: str = "data", **fields: Any) -> str:
        """Reserve a fresh run of `argv`; its id."""
        run, identity = identity_of(kind)
        given = {"secrets": fields.pop("given")} if "given" in fields else {}
        self.call("reserve", run=run, identity=identity, launch=self.launch_of(run, argv, **fields), **given)
        return run

    def python(self, program: str, kind: str = "data", **fields: Any) -> str:
        """Reserve a fresh run of a Python program."""
        return self.reserve([sys.executable, "-I", "-c", program], kind, **fields)

    def state(self, run: str) -> dict[str, Any]:
        """The run's state as the agent derives it."""
        from dispatch.agent.state import derive

        return derive(self.root.run(run))

    def paths(self, run: str) -> RunPaths:
        """The files of a run."""
        return self.root.run(run)

    def wait(self, run: str, *states: str, seconds: float = 20.0) -> dict[str, Any]:
        """Wait until the run is in one of the states."""
        return wait_for(lambda: (s := self.state(run))["state"] in states and s, seconds, lambda: self.state(run))

    def ran(self, program: str, **fields: Any) -> dict[str, Any]:
        """Reserve, launch and finish a Python program; its state at the end."""
        run = self.python(program, **fields)
        self.call("launch", chain=[run])
        return self.wait(run, "finished")

    def marked(self) -> list[int]:
        """Living processes that carry this test's mark."""
        found = []
        for name in os.listdir("/proc"):
            if not name.isdigit() or int(name) == os.getpid():
                continue
            try:
                environment = Path("/proc", name, "environ").read_bytes()
            except OSError:
                continue
            process = look(int(name))
            if self.mark.encode() in environment and process is not None and process.alive:
                found.append(int(name))
        return found


def _answered(frame: protocol.Frame) -> protocol.Frame:
    if not frame.document["ok"]:
        raise Refusal(frame.document["error"])
    return frame


def identity_of(kind: str, **spec: Any) -> tuple[str, str]:
    """A fresh identity and the run id that its digest gives."""
    identity = json.dumps({"schema": 1, "kind": kind, "code": "c0de", "attempt": 1, "spec": spec or uuid.uuid4().hex})
    return f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:20]}", identity


def wait_for(look_for: Callable[[], Any], seconds: float = 20.0, describe: Callable[[], Any] = lambda: None) -> Any:
    """The first true value of `look_for` before the deadline."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look_for()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"did not happen within {seconds} s; last seen: {describe()}")


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every path below a folder with inode, size and change time."""
    return {
        str(path.relative_to(folder)): ((found := path.lstat()).st_ino, found.st_size, found.st_ctime_ns)
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def host(tmp_path: Path) -> Iterator[AgentHost]:
    """A host; at the end no process of the test may be left, and its lease and locks must be free."""
    yield from checked(AgentHost(tmp_path))


def checked(made: AgentHost) -> Iterator[AgentHost]:
    """That host for a test; at its end no process of the test may be left, and no temporary file."""
    yield made
    deadline = time.monotonic() + 5
    left = made.marked()
    while left and time.monotonic() < deadline:
        time.sleep(0.01)
        left = made.marked()
    described = [(pid, Path(f"/proc/{pid}/cmdline").read_bytes()) for pid in left if Path(f"/proc/{pid}").exists()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not described, f"stray processes: {described}"
    for folder in (made.root.agent, made.root.cas, made.root.runs, made.root.locks):
        names = [
            path.name for path in folder.rglob("*") if path.name.startswith((".tmp-", ".reserving-", ".removing-"))
        ]
        assert not names, f"stray temporary files: {names}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 24 MiB, taken away at the end."""
    disk = tmp_path / "disk"
    disk.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small filesystem cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def small_host(small_disk: Path) -> Iterator[AgentHost]:
    """A host whose state lies on a filesystem of 24 MiB."""
    yield from checked(AgentHost(small_disk))
