"""Each door at which a connection can fail is told apart, in words of its own, before ten seconds are over."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.hosts.inventory import Host
from dispatch.transport.link import HostKeyError, LinkError
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]

pytestmark = pytest.mark.sshd
_NEXT_IS_A_COMMAND = ("ssh", "ping", "latentforge", "PubkeyAuthentication", "compare", "correct", "is sshd", "look ")


def key_pair(path: Path, passphrase: str = "") -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", str(path)], check=True)
    return path


def knock(transport: Any) -> tuple[Any, float]:
    begin = time.monotonic()
    try:
        answer: Any = transport.call("probe", {})
    except (LinkError, HostKeyError) as error:
        answer = error
    return answer, time.monotonic() - begin


def test_every_door_has_a_kind_and_a_text_of_its_own_within_ten_seconds(
    sshd_here: Make, trusted: Make, reached: Make, impostor: Make, tmp_path: Path
) -> None:
    server = sshd_here()
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").write_text("echo Good morning\nexit 3\n")
    good = trusted(server)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        doors: dict[str, Host] = {
            "name": good.model_copy(update={"address": "no-such-host.invalid"}),
            "refused": good.model_copy(update={"port": unused.getsockname()[1]}),
            "silent": good.model_copy(update={"port": impostor(b"")}),
            "not ssh": good.model_copy(update={"port": impostor(b"HTTP/1.1 400 Bad Request\r\n\r\n")}),
            "closed": good.model_copy(update={"port": impostor(b"", hangs_up=True)}),
            "key exchange": good.model_copy(update={"port": impostor(b"SSH-2.0-OpenSSH_9.6\r\n")}),
            "authentication": good.model_copy(update={"identity": str(key_pair(tmp_path / "stranger"))}),
            "no commands": trusted(sshd_here(shell="/usr/sbin/nologin"), "a"),
            "shell noise": trusted(sshd_here(shell="/bin/bash", home=home), "b"),
            "no python": good.model_copy(update={"python": "/nowhere/python3"}),
            "unknown host key": good.model_copy(update={"name": "c", "keys": ()}),
        }
        answers: dict[str, tuple[Any, float]] = {}

        def try_door(kind: str, host: Host) -> None:
            answers[kind] = knock(reached(host))

        threads = [threading.Thread(target=try_door, args=door) for door in doors.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for kind, (error, seconds) in answers.items():
        assert isinstance(error, LinkError | HostKeyError), f"{kind}: {error}"
        assert error.kind == kind, f"{kind}: {error}"
        assert error.code is ExitCode.TRANSPORT, kind
        assert error.next, kind
        assert seconds < 10, f"{kind} took {seconds:.1f} s"
    assert answers.keys() == doors.keys()
    texts = [str(error) for error, _ in answers.values()]
    assert len(set(texts)) == len(texts)
    assert "Good morning" in str(answers["shell noise"][0])
    assert "(status 3)" in str(answers["shell noise"][0])
    assert "HTTP/1.1 400" in str(answers["not ssh"][0])
    assert "does not answer the key exchange" in str(answers["key exchange"][0])


@pytest.mark.fault(row=4)
def test_a_network_that_swallows_everything_is_no_route_and_said_within_ten_seconds(
    wire: Make, sshd_here: Make, trusted: Make, reached: Make
) -> None:
    link = wire()
    host = trusted(sshd_here(wire=link))
    assert reached(host).call("probe", {}).result["root"]
    link.cut()
    error, seconds = knock(reached(host))
    assert error.kind == "route"
    assert error.next == f"ping {link.host}"
    assert seconds < 10


def test_a_resolver_that_does_not_answer_is_not_waited_for(
    trusted: Make, reached: Make, shared_sshd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for_good = threading.Event()
    monkeypatch.setattr("dispatch.transport.dial.RESOLVE_SECONDS", 0.5)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **more: for_good.wait(20) and [])
    error, seconds = knock(reached(trusted(shared_sshd)))
    for_good.set()
    assert error.kind == "name"
    assert "no answer from the resolver" in str(error)
    assert seconds < 10


def test_algorithms_that_do_not_meet_are_told_as_a_failed_key_exchange(
    sshd_here: Make, trusted: Make, reached: Make
) -> None:
    host = trusted(sshd_here(options="Ciphers aes128-ctr\nMACs umac-64@openssh.com"))
    error, seconds = knock(reached(host))
    assert error.kind == "key exchange"
    assert "macs" in str(error).lower()
    assert seconds < 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("MaxSessions 0", "no session is opened"),
        ("ForceCommand internal-sftp", None),
        ("ForceCommand echo This service allows sftp connections only.", "sftp connections only"),
    ],
)
def test_an_account_that_may_not_run_commands_is_told_as_one(
    sshd_here: Make, trusted: Make, reached: Make, options: str, said: str | None
) -> None:
    error, seconds = knock(reached(trusted(sshd_here(options=options))))
    assert error.kind in ("no commands", "shell noise")
    assert said is None or (error.kind == "no commands" and said in str(error))
    assert seconds < 10


@pytest.mark.parametrize(
    ("options", "said", "remedy"),
    [
        ("PubkeyAuthentication no\nPasswordAuthentication yes", "it takes: password", "PubkeyAuthentication yes"),
        (
            "AuthenticationMethods publickey,password\nPasswordAuthentication yes",
            "more is asked",
            "AuthenticationMethods",
        ),
        ("DenyUsers *", "no key of yours is accepted", "ssh-copy-id"),
    ],
)
def test_why_a_key_does_not_let_us_in_is_said(
    sshd_here: Make, trusted: Make, reached: Make, options: str, said: str, remedy: str
) -> None:
    error, seconds = knock(reached(trusted(sshd_here(options=options))))
    assert error.kind == "authentication"
    assert said in str(error)
    assert error.next.startswith(remedy)
    assert seconds < 10


@pytest.fixture
def ssh_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A real ssh-agent; call it with key files to add."""
    path = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.setenv("SSH_AUTH_SOCK", str(path))

    def add(*keys: Path, passphrase: str = "") -> None:
        answer = tmp_path / "answer"
        answer.write_text(f"#!/bin/sh\necho '{passphrase}'\n")
        answer.chmod(0o755)
        env = {**os.environ, "SSH_ASKPASS": str(answer), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": "none"}
        subprocess.run(["ssh-add", "-q", *map(str, keys)], check=True, env=env, stdin=subprocess.DEVNULL)

    yield add
    process.terminate()
    process.wait(10)


def test_an_encrypted_key_file_is_used_through_the_agent_and_refused_by_name_without_it(
    sshd_here: Make, trusted: Make, reached: Make, ssh_agent: Make, tmp_path: Path
) -> None:
    server = sshd_here()
    locked = key_pair(tmp_path / "locked", "open sesame")
    (server.folder / "authorized_keys").write_text(locked.with_suffix(".pub").read_text())
    host = trusted(server, identity=str(locked))
    error, _ = knock(reached(host))
    assert error.kind == "authentication"
    assert f"the key file '{locked}' is encrypted, and not in ssh-agent" in str(error)
    assert error.next == f"load it into ssh-agent:  ssh-add {locked}"
    ssh_agent(locked, passphrase="open sesame")
    assert reached(host).call("probe", {}).result["root"], "the remedy that was named works"
    # No key file named: the agent's key does it too.
    assert reached(host.model_copy(update={"identity": None})).call("probe", {}).result["root"]


def test_a_key_file_that_others_may_read_is_refused_with_the_command_that_mends_it(
    sshd_here: Make, trusted: Make, reached: Make
) -> None:
    server = sshd_here()
    server.key.chmod(0o644)
    host = trusted(server)
    error, _ = knock(reached(host))
    assert error.kind == "authentication"
    assert "mode 0644: others may read it" in str(error)
    assert error.next == f"chmod 600 {server.key}"
    assert "publickey" not in server.log.read_text()
    subprocess.run(error.next.split(), check=True)
    assert reached(host).call("probe", {}).result["root"], "the remedy that was named works"


def test_a_certificate_of_a_key_lets_us_in_and_one_that_ran_out_does_not_stop_the_key(
    sshd_here: Make, trusted: Make, reached: Make, tmp_path: Path
) -> None:
    authority, key = key_pair(tmp_path / "authority"), key_pair(tmp_path / "mine")
    server = sshd_here(options=f"TrustedUserCAKeys {authority}.pub")

    def certify(until: str) -> None:
        sign = ["ssh-keygen", "-q", "-s", str(authority), "-I", "me", "-n", getpass.getuser(), "-V", until]
        subprocess.run([*sign, f"{key}.pub"], check=True)

    certify("-1h:+1h")
    host = trusted(server, identity=str(key))
    assert reached(host).call("probe", {}).result["root"], "by its certificate alone"
    certify("-2h:-1h")
    error, _ = knock(reached(host))
    assert error.kind == "authentication"
    assert f"(tried: {key}-cert.pub, {key})" in str(error)
    with (server.folder / "authorized_keys").open("a") as file:
        file.write(key.with_suffix(".pub").read_text())
    assert reached(host).call("probe", {}).result["root"], "by the key itself"


def test_a_named_key_is_the_only_one_that_a_server_is_offered(
    sshd_here: Make, trusted: Make, reached: Make, ssh_agent: Make, tmp_path: Path
) -> None:
    server = sshd_here(options="MaxAuthTries 2")
    ssh_agent(*(key_pair(tmp_path / f"other{number}") for number in range(4)))
    host = trusted(server)
    assert reached(host).call("probe", {}).result["root"], "not spoilt by the agent's keys"
    error, _ = knock(reached(host.model_copy(update={"identity": None})))
    assert error.kind == "authentication"
    assert "the server hung up after 2 keys" in str(error)
    assert "--identity FILE" in error.next


def test_an_agent_that_never_answers_stops_nobody(
    sshd_here: Make, trusted: Make, reached: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dispatch.transport.keys._LIST_SECONDS", 0.3)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        deaf.listen()
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "deaf"))
        answer, seconds = knock(reached(trusted(sshd_here())))
    assert answer.result["root"]
    assert seconds < 10


@pytest.mark.fault(row=21)
def test_a_changed_host_key_is_refused_before_any_agent_or_user_is_named(
    sshd_here: Make, trusted: Make, reached: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = sshd_here()
    host = trusted(server)
    pinned = host.keys[0].sha256
    server.stop()
    offered = server.make_host_key()
    server.start()
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(tmp_path / "agent"))
        agent.listen()
        agent.setblocking(False)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
        error, _ = knock(reached(host.model_copy(update={"identity": None})))
        with pytest.raises(BlockingIOError):
            agent.accept()
    assert error.kind == "changed host key"
    assert pinned in str(error)
    assert offered in str(error)
    assert "publickey" not in server.log.read_text()


@pytest.mark.fault(row=22)
def test_a_host_that_was_never_enrolled_is_refused_and_enrol_is_named(
    sshd_here: Make, trusted: Make, reached: Make
) -> None:
    server = sshd_here()
    host = trusted(server).model_copy(update={"name": "new", "keys": ()})
    error, _ = knock(reached(host))
    assert error.kind == "unknown host key"
    assert "latentforge dispatch enrol new" in error.next
    assert server.logins() == 0


@pytest.mark.fault(row=23)
@pytest.mark.parametrize("kind", ["rsa", "ecdsa", "ed25519"])
def test_the_pinned_key_is_asked_for_whatever_the_server_would_rather_show(
    sshd_here: Make, trusted: Make, reached: Make, kind: str
) -> None:
    server = sshd_here(start=False)
    for other in ("rsa", "ecdsa"):
        server.make_host_key(other)
    server.start()
    host = trusted(server, keys=(kind,))
    assert len(host.keys) == 1
    assert reached(host).call("probe", {}).result["root"]
