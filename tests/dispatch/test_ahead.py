"""What is begun before the first question is asked: the connection, and the agent on the host."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from dispatch.hosts.inventory import Host
from dispatch.transport.ahead import Ahead
from dispatch.transport.link import Link, LinkError
from dispatch.transport.retry import call

Make = Callable[..., Any]


@pytest.fixture
def begun(shared_sshd: Any, enrolled: Make, reached: Make, eventually: Make) -> Any:
    """A transport whose agent was started ahead, and was asked nothing yet."""
    transport = reached(enrolled(shared_sshd))
    before = commands(shared_sshd)
    transport.ahead("probe")
    eventually(lambda: commands(shared_sshd) > before, "the agent is started")
    return transport


def commands(server: Any) -> int:
    """How many programs were started over a server."""
    return int(server.log.read_text().count("Starting session: command"))


@pytest.mark.sshd
def test_the_first_call_uses_the_agent_that_was_begun_ahead(shared_sshd: Any, enrolled: Make, reached: Make) -> None:
    transport = reached(enrolled(shared_sshd))
    before, logins = commands(shared_sshd), shared_sshd.logins()
    transport.ahead("probe")
    assert transport.call("probe", {"runs": [{"id": "data-" + "0" * 20}]}).result["runs"]
    assert (commands(shared_sshd) - before, shared_sshd.logins() - logins) == (1, 1)
    assert transport.call("probe", {}).result["root"]
    assert (commands(shared_sshd) - before, shared_sshd.logins() - logins) == (2, 1)


@pytest.mark.sshd
def test_another_call_than_the_one_begun_ahead_is_answered_all_the_same(
    shared_sshd: Any, enrolled: Make, reached: Make, eventually: Make
) -> None:
    transport = reached(enrolled(shared_sshd))
    before = commands(shared_sshd)
    transport.ahead("probe")
    assert transport.call("status", {"runs": []}).result == {}
    assert commands(shared_sshd) - before == 2


@pytest.mark.sshd
def test_a_connection_that_breaks_before_the_first_call_is_made_again(
    shared_sshd: Any, begun: Any, eventually: Make
) -> None:
    assert eventually(shared_sshd.cut, "a session is cut")
    assert call(begun, "probe", {}).result["root"]


@pytest.mark.sshd
def test_what_was_begun_ahead_and_never_asked_leaves_no_session_behind(
    shared_sshd: Any, begun: Any, eventually: Make
) -> None:
    begun.close()
    eventually(lambda: not shared_sshd.sessions(), "its session ends")


@pytest.mark.sshd
def test_a_python_that_is_not_there_is_told_as_such_when_it_was_begun_ahead(
    shared_sshd: Any, enrolled: Make, reached: Make
) -> None:
    transport = reached(enrolled(shared_sshd).model_copy(update={"python": "/no/such/python"}))
    transport.ahead("probe")
    with pytest.raises(LinkError, match="cannot be run there") as refused:
        transport.call("probe", {})
    assert refused.value.kind == "no python"


def test_a_host_that_refuses_is_told_by_the_first_call_and_not_before(reached: Make) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and nobody listens
        host = Host(name="box", address="127.0.0.1", port=closed.getsockname()[1], user="nobody")
        transport = reached(host)
        transport.ahead("probe")
        with pytest.raises(LinkError, match="nothing listens") as refused:
            transport.call("probe", {})
    assert refused.value.kind == "refused"


def test_whoever_leaves_early_does_not_wait_for_a_host_that_is_silent(reached: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        before = set(threading.enumerate())
        transport = reached(Host(name="box", address="127.0.0.1", port=silent.getsockname()[1], user="nobody"))
        transport.ahead("probe")
        peer, _ = silent.accept()
        transport.close()
        waiting = set(threading.enumerate()) - before
        assert waiting  # it still listens for a greeting, and nobody waited for that
        peer.close()
        for thread in waiting:
            thread.join(20)
            assert not thread.is_alive()


def test_work_that_is_left_is_undone_once_it_has_ended() -> None:
    gate, undone = threading.Event(), threading.Event()
    work = Ahead(gate.wait, undone.set)
    assert not work.leave()
    assert not undone.is_set()
    gate.set()
    assert undone.wait(20)
    done = Ahead(lambda: 7, undone.clear)
    assert done.result() == 7
    assert done.leave()
    assert undone.is_set()  # what has ended is for its owner to undo


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="no TCP_QUICKACK on this system")
def test_what_a_host_says_is_acknowledged_at_once() -> None:
    """sshd holds a small answer back until its last one was acknowledged: 40 ms at the beginning of every session."""

    def at_once() -> int:
        return link.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK)

    with socket.create_server(("127.0.0.1", 0)) as server:
        link = Link(socket.create_connection(server.getsockname()))
        with server.accept()[0] as peer:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
            assert not at_once()
            peer.sendall(b"word")
            assert link.recv(4) == b"word"
            assert at_once()
        link.close()


def test_a_session_imports_what_ssh_and_broken_links_need_only_when_it_meets_them() -> None:
    program = "import sys, dispatch.session, dispatch.transport.local; print(*sys.modules)"
    asked = [sys.executable, "-P", "-c", program]
    loaded = set(subprocess.run(asked, check=True, capture_output=True, text=True, env={**os.environ}).stdout.split())
    assert "dispatch.planning.survey" in loaded
    heavy = {"paramiko", "fabric", "invoke", "asyncio", "tenacity", "httpx", "rich", "numpy", "torch", "transformers"}
    assert not loaded & heavy
