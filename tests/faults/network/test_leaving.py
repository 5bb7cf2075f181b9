"""The laptop's command is interrupted or killed at each step of a dispatch, and the host's sessions with it."""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dispatch.transport.ssh import SshTransport
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]

pytestmark = pytest.mark.sshd


def in_a_child(work: Callable[[], int]) -> int:
    """Run in a process of its own, as a command would be; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1):
                os.dup2(null, fd)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def struck(verb: str, when: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process hit by a signal before a verb's first call is sent, or after its first reply has come."""
    real_call, real_stream = SshTransport.call, SshTransport.stream

    def hit(asked: str, now: str) -> None:
        if asked == verb and now == when:
            os.kill(os.getpid(), number)

    def call(self: SshTransport, asked: str, *args: Any, **more: Any) -> Any:
        hit(asked, "before")
        reply = real_call(self, asked, *args, **more)
        hit(asked, "after")
        return reply

    def stream(self: SshTransport, asked: str, *args: Any, **more: Any) -> Iterator[Any]:
        hit(asked, "before")
        for reply in real_stream(self, asked, *args, **more):
            hit(asked, "after")
            yield reply

    monkeypatch.setattr(SshTransport, "call", call)
    monkeypatch.setattr(SshTransport, "stream", stream)


STEPS = [
    ("probe", "before"),
    ("probe", "after"),
    ("install", "after"),
    ("reserve", "before"),
    ("reserve", "after"),
    ("launch", "before"),
    ("launch", "after"),
    ("follow", "before"),
    ("follow", "after"),
    ("collect", "before"),
    ("collect", "after"),
    ("fetch", "before"),
    ("fetch", "after"),
]


@pytest.fixture
def dispatching(
    shared_sshd: Any, trusted: Make, ask: Make, built: Make, jobs: Any, laptop: Any
) -> tuple[Callable[[], int], Any, Any]:
    """One dispatch with fake jobs to a real server: the work of its command, the host, and the list of starts."""
    from dispatch.session import Session
    from dispatch.transport.open import open_transport

    host = trusted(shared_sshd)
    request = ask(host)
    built(host, request)
    jobs.how["steps"] = 3

    def work() -> int:
        transport = open_transport(host, laptop.places)
        try:
            return int(Session(transport, laptop.places).go(request))
        finally:
            transport.close()

    return work, host, jobs


def once(jobs: Any) -> None:
    """Every run of the pipeline was started exactly once."""
    assert sorted(run.split("-")[0] for run in jobs.starts()) == ["data", "distill", "score", "teacher"]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.fault(row=8), id="kill -9"),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.fault(row=7), id="Ctrl-C"),
    ],
)
def test_a_dispatch_whose_command_is_ended_at_every_step_in_turn_is_completed_and_starts_each_run_once(
    dispatching: Any, number: int, code: int
) -> None:
    work, _, jobs = dispatching
    jobs.hold_at(2)
    for verb, when in STEPS:
        if verb == "collect":
            jobs.open()
        with pytest.MonkeyPatch.context() as patch:
            struck(verb, when, number, patch)
            assert in_a_child(work) == code, f"{when} {verb}"
    assert in_a_child(work) == int(ExitCode.PASS)
    once(jobs)


@pytest.mark.soak
@pytest.mark.fault(row=8)
@pytest.mark.parametrize(("verb", "when"), STEPS, ids=lambda one: one)
def test_a_command_killed_at_one_step_is_completed_by_the_next(dispatching: Any, verb: str, when: str) -> None:
    work, _, jobs = dispatching
    with pytest.MonkeyPatch.context() as patch:
        struck(verb, when, signal.SIGKILL, patch)
        assert in_a_child(work) == -signal.SIGKILL, "it was hit"
    assert in_a_child(work) == int(ExitCode.PASS)
    once(jobs)


@pytest.mark.fault(row=8)
@pytest.mark.parametrize("at", [0.3, pytest.param(0.9, marks=pytest.mark.soak)])
def test_a_command_killed_while_it_sends_the_code_leaves_no_file_under_its_name(
    sshd_here: Make, trusted: Make, reached: Make, tmp_path: Path, eventually: Make, at: float
) -> None:
    import hashlib

    from dispatch.transport.sending import send

    server = sshd_here()
    host = trusted(server)
    content = os.urandom(24 << 20)
    sha256 = hashlib.sha256(content).hexdigest()
    cas = tmp_path / "remote/cas"

    def work() -> int:
        send(reached(host), sha256, content)
        return 0

    pid = os.fork()
    if pid == 0:
        os._exit(work())
    eventually(lambda: any(part.stat().st_size > at * len(content) for part in cas.glob(".part-*")), "it is under way")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not (cas / sha256).exists()
    sent = send(reached(host), sha256, content)
    assert sent <= (1 - at) * len(content)
    assert (cas / sha256).read_bytes() == content
    assert [path.name for path in cas.iterdir()] == [sha256]


@pytest.mark.fault(row=5)
def test_jobs_outlive_the_kill_of_every_process_that_serves_a_connection(
    sshd_here: Make, trusted: Make, ask: Make, built: Make, jobs: Any, aside: Make, eventually: Make
) -> None:
    server = sshd_here()
    host = trusted(server)
    request = ask(host)
    built(host, request)
    jobs.hold_at(5)
    going = aside(host, request)
    run, copy = going.run, going.copy
    eventually(lambda: copy.exists() and b"step 4/" in copy.read_bytes(), "it is followed")
    supervisor = json.loads((Path(host.root or "") / "runs" / run / "supervisor.json").read_text())["pid"]
    for _ in range(3):
        eventually(server.cut, "it is connected, and cut")  # what was killed last may be listed for a moment yet
    os.kill(supervisor, 0)
    jobs.open()
    assert going.end() is ExitCode.PASS
    once(jobs)
