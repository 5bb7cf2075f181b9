"""The network is cut, at every moment of a dispatch: it is noticed in time, and nothing is lost or done twice."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.transport.link import LinkLostError
from dispatch.transport.sending import send
from latentforge.errors import UnknownOutcomeError
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]

pytestmark = pytest.mark.sshd
NOTICED_WITHIN = 25.0


def is_lost(transport: Any, argv: list[str], stdin: bytes = b"") -> bool:
    """Whether a program's connection breaks before it has ended."""
    try:
        return transport.exchange(argv, stdin, timeout=100).status is None
    except LinkLostError:
        return True


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same keepalive with shorter times, for tests that are not about how long it takes."""
    monkeypatch.setattr("dispatch.transport.link.DEAD_LINK_SECONDS", 2)
    monkeypatch.setattr("dispatch.transport.link.KEEPALIVE_SECONDS", 1)
    monkeypatch.setattr("dispatch.transport.dial.CONNECT_SECONDS", 1.0)


@pytest.fixture
def by_way_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """An ssh configuration in which a name is reached through a jump host."""

    def configure(jump: Any, name: str, target: Any, *, agent: bool = False) -> None:
        config = tmp_path / "ssh_config"
        key = "" if agent else f"  IdentityFile {jump.key}\n  IdentitiesOnly yes\n"
        config.write_text(
            f"Host jump\n  HostName {jump.address}\n  Port {jump.port}\n  StrictHostKeyChecking no\n"
            f"  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n{key}"
            f"Host {name}\n  HostName {target.address}\n  Port {target.port}\n  ProxyJump jump\n"
        )
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {config} "$@"\n')
        (folder / "ssh").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return configure


@pytest.mark.fault(row=4)
@pytest.mark.fault(row=36)
def test_a_network_that_goes_silent_is_noticed_within_25_seconds_whatever_goes_on_and_a_slow_one_is_not(
    wire: Make, sshd_here: Make, trusted: Make, reached: Make, by_way_of: Make, record_property: Make
) -> None:
    link, slow = wire(), wire()
    server, jump, far = sshd_here(wire=link), sshd_here(), sshd_here(wire=slow)
    host = trusted(server)
    by_way_of(jump, "behind", server)
    link.slow(4000)
    slow.slow(64)
    hosts = {
        "waiting for a reply": (host, ["sleep", "120"], b""),
        "sending": (host, ["sh", "-c", "cat > /dev/null"], bytes(64 << 20)),
        "receiving": (host, ["cat", "/dev/zero"], b""),
        "waiting behind a jump host": (
            host.model_copy(update={"address": "behind", "port": None}),
            ["sleep", "120"],
            b"",
        ),
    }
    open_all = {name: reached(one) for name, (one, _, _) in hosts.items()}
    for transport in open_all.values():
        assert transport.exchange(["true"], b"", timeout=20).status == 0
    noticed: dict[str, float] = {}
    cut_at: list[float] = []
    slowly: list[Any] = []

    def work(name: str) -> None:
        _, argv, stdin = hosts[name]
        assert is_lost(open_all[name], argv, stdin)
        noticed[name] = time.monotonic() - cut_at[0] if cut_at else -1.0

    def over_the_slow_wire() -> None:
        slowly.append(reached(trusted(far, "far")).call("probe", {}))

    threads = [threading.Thread(target=work, args=(name,)) for name in hosts]
    threads.append(threading.Thread(target=over_the_slow_wire))
    for thread in threads:
        thread.start()
    time.sleep(1.5)  # not to wait for anything: to be in the middle of it
    cut_at.append(time.monotonic())
    link.cut()
    for thread in threads:
        thread.join(60)
    link.restore()
    for name, seconds in noticed.items():
        record_property(name, round(seconds, 1))
        print(f"{name}: noticed after {seconds:.1f} s")
        assert 0 < seconds <= NOTICED_WITHIN, f"{name}: {seconds:.1f} s"
    assert noticed.keys() == hosts.keys()
    assert slowly, "at 64 kbit/s everything takes its time, and nothing is lost"
    assert slowly[0].result["root"]


@pytest.mark.fault(row=1)
def test_an_upload_that_is_cut_leaves_nothing_under_its_name_and_the_next_one_sends_the_rest(
    wire: Make, sshd_here: Make, trusted: Make, reached: Make, impatient: None, eventually: Make, tmp_path: Path
) -> None:
    link = wire()
    transport = reached(trusted(sshd_here(wire=link)))
    transport.install()
    content = os.urandom(6 << 20)
    sha256 = hashlib.sha256(content).hexdigest()
    cas = tmp_path / "remote/cas"
    link.slow(16_000)
    raised: list[BaseException] = []

    def sending() -> None:
        try:
            send(transport, sha256, content)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=sending)
    thread.start()
    third = 0.3 * len(content)
    eventually(lambda: any(part.stat().st_size > third for part in cas.glob(".part-*")), "30 % has arrived")
    begin = time.monotonic()
    link.cut()
    thread.join(60)
    assert time.monotonic() - begin < NOTICED_WITHIN
    assert isinstance(raised[0], UnknownOutcomeError)
    assert "it sends the rest" in str(raised[0].next)
    assert not (cas / sha256).exists()
    link.fast()
    link.restore()
    sent = send(transport, sha256, content)
    assert 0 < sent <= len(content) - third
    assert hashlib.sha256((cas / sha256).read_bytes()).hexdigest() == sha256
    assert [path.name for path in cas.iterdir()] == [sha256]
    assert send(transport, sha256, content) == 0
    # The first sending's agent still waits for bytes that never come: it ends with its session.


@pytest.mark.fault(row=2)
def test_a_launch_whose_reply_is_lost_is_repeated_and_starts_one_process(
    wire: Make,
    sshd_here: Make,
    trusted: Make,
    impatient: None,
    ask: Make,
    built: Make,
    jobs: Any,
    session: Make,
    eventually: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dispatch.transport.pipe import Pipe
    from dispatch.transport.ssh import SshTransport

    link = wire()
    host = trusted(sshd_here(wire=link))
    request = ask(host)
    built(host, request)
    real_through, real_call = Pipe.through, SshTransport.call
    launches: list[str] = []

    def through(self: Pipe, stdin: bytes) -> Any:
        if launches == ["launch"]:
            link.deafen()
        return real_through(self, stdin)

    def call(self: SshTransport, verb: str, *args: Any, **more: Any) -> Any:
        if verb != "launch":
            return real_call(self, verb, *args, **more)
        launches.append(verb)
        try:
            return real_call(self, verb, *args, **more)
        except LinkLostError:
            eventually(jobs.starts, "the request has arrived and was acted upon")
            link.hear()
            raise

    monkeypatch.setattr(Pipe, "through", through)
    monkeypatch.setattr(SshTransport, "call", call)
    dispatch = session(host)
    assert dispatch.go(request) is ExitCode.PASS
    assert launches == ["launch", "launch"], "the reply was lost"
    assert sorted(run.split("-")[0] for run in jobs.starts()) == ["data", "distill", "score", "teacher"]


@pytest.mark.fault(row=3)
@pytest.mark.fault(row=6)
@pytest.mark.parametrize("away", [3.0, pytest.param(30.0, marks=pytest.mark.soak)])
def test_following_goes_on_at_its_byte_after_a_cut_and_after_a_restart_of_the_server(
    wire: Make,
    sshd_here: Make,
    trusted: Make,
    impatient: None,
    ask: Make,
    built: Make,
    jobs: Any,
    aside: Make,
    eventually: Make,
    laptop: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    away: float,
) -> None:
    link = wire()
    server = sshd_here(wire=link)
    host = trusted(server)
    request = ask(host)
    built(host, request)
    jobs.how |= {"steps": 400, "noise": True}
    jobs.hold_at(200)
    going = aside(host, request)
    run, copy = going.run, going.copy
    eventually(lambda: copy.exists() and b"step 199/400" in copy.read_bytes(), "it is followed")
    link.cut()
    jobs.open()
    remote = tmp_path / "remote/runs" / run
    eventually(lambda: (remote / "exit.rec").read_bytes()[:1].strip(b"\0"), "the run ends, cut or not")
    eventually(lambda: "UNKNOWN" in capsys.readouterr().out, "it is told that the host is away", 40)
    server.stop()
    link.restore()
    time.sleep(away)  # the fault itself: a server that is away for a while
    server.start()
    assert going.end(90) is ExitCode.PASS
    for name in ("launch.log", "events.jsonl"):
        assert (laptop.places.followed("box", run) / name).read_bytes() == (remote / name).read_bytes()
    assert len(jobs.starts()) == 4


@pytest.mark.fault(row=4)
def test_a_laptop_that_slept_finds_its_dead_connection_out_and_the_host_drops_it_too(
    wire: Make,
    sshd_here: Make,
    trusted: Make,
    reached: Make,
    eventually: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # While it sleeps, its kernel asks nobody for signs of life.
    monkeypatch.setattr("dispatch.transport.link.KEEPALIVE_SECONDS", 3600)
    monkeypatch.setattr("dispatch.transport.ssh.KEEPALIVE_SECONDS", 3600)
    link = wire()
    server = sshd_here(wire=link, options="ClientAliveInterval 1\nClientAliveCountMax 2")
    transport = reached(trusted(server))
    assert transport.call("probe", {}).result["root"]
    link.cut()
    eventually(lambda: not server.sessions(), "the server drops a client that is silent", 30)
    link.restore()
    begin = time.monotonic()
    assert is_lost(transport, ["true"])
    assert time.monotonic() - begin < NOTICED_WITHIN
    assert transport.call("probe", {}).result["root"], "the next call connects anew"
