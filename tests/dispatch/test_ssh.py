"""Trust and transport against a real OpenSSH server on loopback."""

from __future__ import annotations

import getpass
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dispatch.hosts.inventory import Host, Inventory
from dispatch.session import preview
from dispatch.transport.link import HostKeyError, LinkError
from dispatch.transport.open import open_transport
from latentforge.errors import RefusedError
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]

pytestmark = pytest.mark.sshd


def words_of(server: Any, name: str, root: Path, *more: str) -> list[str]:
    return [
        *("enrol", name, "--address", "127.0.0.1", "--port", str(server.port), "--user", getpass.getuser()),
        *("--identity", str(server.key), "--root", str(root), "--python", sys.executable, *more),
    ]


def test_enrol_shows_the_fingerprint_pins_the_key_and_logs_in(sshd_at: Make, laptop: Any, tmp_path: Path) -> None:
    server = sshd_at()
    fingerprint = server.make_host_key("ecdsa")
    server.stop()
    server.start()
    done = laptop.process(*words_of(server, "box", tmp_path / "remote", "--yes"))
    assert done.returncode == 0, done.stderr
    assert fingerprint in done.stdout
    assert "ED25519" in done.stdout
    assert "logged in: " in done.stdout
    host = Inventory.load(laptop.places).get("box")
    assert {key.sha256 for key in host.keys} >= {fingerprint}
    assert not (tmp_path / "remote").exists(), "enrolling must leave nothing on the host"
    # A second time, nothing is asked and nothing changes.
    before = laptop.places.hosts_file.read_bytes()
    again = laptop.cli(*words_of(server, "box", tmp_path / "remote"))
    assert again.returncode == 0, again.stderr
    assert laptop.places.hosts_file.read_bytes() == before


def test_a_key_file_that_is_enrolled_by_a_relative_name_is_found_from_every_folder(
    shared_sshd: Any, laptop: Any, tmp_path: Path
) -> None:
    words = words_of(shared_sshd, "box", tmp_path / "remote", "--yes")
    words[words.index("--identity") + 1] = shared_sshd.key.name
    done = laptop.cli(*words, cwd=shared_sshd.folder)
    assert done.returncode == 0, done.stderr
    assert Inventory.load(laptop.places).get("box").identity == str(shared_sshd.key)


def test_enrol_without_a_confirmation_pins_nothing(shared_sshd: Any, laptop: Any, tmp_path: Path) -> None:
    done = laptop.cli(*words_of(shared_sshd, "box", tmp_path / "remote"))
    assert done.returncode == 2
    assert "were not confirmed" in done.stderr
    assert not laptop.places.hosts_file.exists()


def test_enrol_by_fingerprint_refuses_any_other_key(shared_sshd: Any, laptop: Any, tmp_path: Path) -> None:
    wrong = "SHA256:" + "A" * 43
    done = laptop.cli(*words_of(shared_sshd, "box", tmp_path / "remote", "--fingerprint", wrong))
    assert done.returncode == 2
    assert wrong in done.stderr
    assert not laptop.places.hosts_file.exists()


def test_an_unknown_host_is_refused_with_the_nearest_and_the_command(laptop: Any, shared_sshd: Any) -> None:
    laptop.cli(*words_of(shared_sshd, "gx10", laptop.home / "remote", "--yes"))
    done = laptop.cli("go", "tiny", "--host", "gx1", "--dry-run")
    assert done.returncode == 2
    assert "host 'gx1' is not enrolled" in done.stderr
    assert "did you mean 'gx10'?" in done.stderr
    assert "latentforge dispatch enrol gx1" in done.stderr


def test_a_changed_host_key_is_refused_before_anything_is_sent(sshd_at: Make, laptop: Any, enrolled: Make) -> None:
    server = sshd_at()
    host = enrolled(server)
    server.stop()
    pinned, offered = host.keys[0].sha256, server.make_host_key()
    server.log.unlink()
    server.start()
    for words in (("go", "tiny", "--host", "box"), ("plan", "tiny", "--host", "box")):
        done = laptop.process(*words)
        assert done.returncode == 6, done.stderr
        assert "error: host key of box changed" in done.stderr
        assert pinned in done.stderr
        assert offered in done.stderr
        assert "nothing was sent" in done.stderr
        assert "latentforge dispatch enrol box --replace" in done.stderr
    # Neither a user name nor a key reached the server: not a line about authentication.
    said = server.log.read_text()
    for word in ("Accepted", "Failed", "publickey", getpass.getuser() + " "):
        assert word not in said, said
    done = laptop.cli("enrol", "box", "--yes")
    assert done.returncode == 6
    assert pinned in done.stderr
    assert offered in done.stderr
    done = laptop.cli("enrol", "box", "--yes", "--replace")
    assert done.returncode == 0
    assert f"and does not offer what is pinned\n  ED25519  {pinned}" in done.stdout


def test_a_key_that_was_never_pinned_is_refused_before_anything_is_sent(shared_sshd: Any, laptop: Any) -> None:
    host = Host(name="box", address="127.0.0.1", port=shared_sshd.port, identity=str(shared_sshd.key))
    before = shared_sshd.logins()
    with pytest.raises(HostKeyError, match="host key of box is not pinned") as refused:
        open_transport(host, laptop.places).call("probe", {})
    assert refused.value.code is ExitCode.TRANSPORT
    assert "latentforge dispatch enrol box" in str(refused.value.next)
    assert shared_sshd.logins() == before


@pytest.mark.parametrize("left", [None, b"", b"box ssh-ed25519 AAAA\n\xff\n"], ids=["lost", "empty", "damaged"])
def test_a_lost_or_damaged_known_hosts_file_is_refused_not_trusted_anew_and_enrol_mends_it(
    shared_sshd: Any, laptop: Any, enrolled: Make, left: bytes | None
) -> None:
    host = enrolled(shared_sshd)
    file = laptop.places.known_hosts("box")
    whole = file.read_bytes()
    file.unlink() if left is None else file.write_bytes(left)
    with pytest.raises(RefusedError, match="in the inventory but not in") as refused:
        open_transport(host, laptop.places).call("probe", {})
    assert refused.value.next == "latentforge dispatch enrol box"
    done = laptop.cli("enrol", "box")
    assert done.returncode == 0, done.stderr
    assert file.read_bytes() == whole
    assert Inventory.load(laptop.places).get("box") == host


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_each_way_not_to_get_in_is_told_apart_within_ten_seconds(
    shared_sshd: Any, laptop: Any, enrolled: Make, silent_port: int, tmp_path: Path
) -> None:
    import subprocess

    host = enrolled(shared_sshd)
    stranger = tmp_path / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(stranger)], check=True)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = unused.getsockname()[1]
        wrongs: dict[str, dict[str, Any]] = {
            "refused": {"port": closed},
            "silent": {"port": silent_port},
            "authentication": {"identity": str(stranger)},
            "name": {"address": "no-such-host.invalid"},
            "no python": {"python": "/nowhere/python3"},
        }
        for kind, change in wrongs.items():
            begin = time.monotonic()
            with pytest.raises(LinkError) as failed:
                open_transport(host.model_copy(update=change), laptop.places).call("probe", {})
            assert failed.value.kind == kind, str(failed.value)
            assert failed.value.code is ExitCode.TRANSPORT
            assert failed.value.next
            assert time.monotonic() - begin < 10


@pytest.mark.parametrize("content", ["", "no key", "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n"])
def test_a_key_file_that_is_no_key_is_refused_by_name_before_anything_is_sent(
    shared_sshd: Any, laptop: Any, enrolled: Make, tmp_path: Path, content: str
) -> None:
    host = enrolled(shared_sshd)
    wrong = tmp_path / "wrong"
    wrong.write_text(content)
    with pytest.raises(LinkError) as failed:
        open_transport(host.model_copy(update={"identity": str(wrong)}), laptop.places).call("probe", {})
    assert failed.value.code is ExitCode.TRANSPORT
    assert str(wrong) in f"{failed.value}"
    assert failed.value.next


def test_a_shell_that_runs_no_commands_is_told_with_its_words(shared_sshd: Any, laptop: Any, enrolled: Make) -> None:
    host = enrolled(shared_sshd)
    transport = open_transport(host, laptop.places)
    real = transport.exchange

    def through_a_bad_shell(argv: list[str], stdin: bytes, *, timeout: float) -> Any:
        return real(["sh", "-c", "echo This account is not available; exit 1"], stdin, timeout=timeout)

    transport.exchange = through_a_bad_shell  # type: ignore[method-assign]
    with pytest.raises(LinkError, match="This account is not available") as failed:
        transport.call("probe", {})
    assert failed.value.kind == "no commands"


def test_what_a_login_shell_prints_first_is_skipped(shared_sshd: Any, laptop: Any, enrolled: Make) -> None:
    host = enrolled(shared_sshd)
    transport = open_transport(host, laptop.places)
    real = transport.exchange

    def noisily(argv: list[str], stdin: bytes, *, timeout: float) -> Any:
        return real(["sh", "-c", "printf 'Welcome \\377\\n=LF-'; exec " + shlex.join(argv)], stdin, timeout=timeout)

    transport.exchange = noisily  # type: ignore[method-assign]
    reply = transport.call("probe", {})
    assert reply.noise.startswith(b"Welcome")
    assert reply.result["python"]["version"]


def test_bytes_of_any_value_and_megabytes_of_them_come_through(shared_sshd: Any, laptop: Any, enrolled: Make) -> None:
    transport = open_transport(enrolled(shared_sshd), laptop.places)
    content = bytes(range(256)) * 20_000
    echo = [sys.executable, "-c", "import sys, shutil; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer)"]
    for _ in range(2):
        ended = transport.exchange(echo, content, timeout=60)
        assert ended.stdout == content
        assert ended.status == 0
    assert transport.exchange(["sh", "-c", "exit 3"], b"", timeout=20).status == 3
    awkward = ["printf", "%s", "a b'c\"d$e`f\\g;h&i|j*k~l!m\n"]
    assert transport.exchange(awkward, b"", timeout=20).stdout == awkward[2].encode()


def test_a_preview_over_ssh_leaves_no_trace_and_is_the_same_twice(
    shared_sshd: Any, laptop: Any, enrolled: Make, ask: Make, tmp_path: Path, capsys: Any, snapshot: Make
) -> None:
    host = enrolled(shared_sshd, root=tmp_path / "remote")
    before = snapshot(laptop.home)
    shown = []
    for _ in range(2):
        assert preview(ask(host), laptop.places, as_json=False) is ExitCode.PASS
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "no build for this lock file and code" in shown[0]
    assert "host key ED25519 SHA256:" in shown[0]
    assert snapshot(laptop.home) == before
    assert not (tmp_path / "remote").exists()


def test_a_preview_cannot_write_whatever_it_is_asked(shared_sshd: Any, laptop: Any, enrolled: Make) -> None:
    from dispatch.agent.__main__ import READ_ONLY, VERBS
    from dispatch.transport.call import READING

    assert READING == READ_ONLY
    transport = open_transport(enrolled(shared_sshd), laptop.places, readonly=True)
    for verb in set(VERBS) - READING:
        with pytest.raises(RefusedError, match="in a preview, which only reads"):
            transport.call(verb, {})


def test_a_connection_cut_while_following_resumes_with_no_byte_lost_or_doubled(
    sshd_at: Make,
    laptop: Any,
    enrolled: Make,
    ask: Make,
    jobs: Any,
    aside: Make,
    built: Make,
    eventually: Make,
    tmp_path: Path,
    capsys: Any,
) -> None:
    server = sshd_at()
    host = enrolled(server, root=tmp_path / "remote")
    request = ask(host)
    built(host, request)
    jobs.how |= {"steps": 3000, "noise": True}
    jobs.hold_at(2000)
    going = aside(host, request)
    run, copy = going.run, going.copy
    eventually(lambda: copy.exists() and copy.stat().st_size > 1000, "it is followed")
    assert server.cut() >= 1
    size = copy.stat().st_size
    jobs.open()
    eventually(lambda: server.logins() >= 3 and copy.stat().st_size > size, "it is followed again")
    server.cut()
    assert going.end() is ExitCode.PASS
    for name in ("launch.log", "events.jsonl"):
        on_host = (tmp_path / "remote/runs" / run / name).read_bytes()
        assert (laptop.places.followed("box", run) / name).read_bytes() == on_host
        assert (laptop.places.run(run) / name).read_bytes() == on_host
    out = capsys.readouterr().out
    printed = [line for line in out.splitlines() if line.startswith("step ")]
    distilled = [line for line in printed if "/3000 " in line]
    assert [int(line.split()[1].split("/")[0]) for line in distilled] == list(range(1, 3001))
    assert len(jobs.starts()) == 4


def test_a_host_that_stays_away_ends_as_unknown_and_the_run_goes_on(
    sshd_at: Make,
    enrolled: Make,
    ask: Make,
    jobs: Any,
    aside: Make,
    session: Make,
    built: Make,
    tmp_path: Path,
) -> None:
    from latentforge.errors import UnknownOutcomeError

    server = sshd_at()
    host = enrolled(server, root=tmp_path / "remote")
    request = ask(host)
    built(host, request)
    jobs.hold_at(5)
    going = aside(host, request, patience=1.0)
    server.stop()
    lost = going.end()
    assert isinstance(lost, UnknownOutcomeError)
    assert lost.code is ExitCode.UNKNOWN
    assert lost.next == f"latentforge dispatch watch {going.run}"
    jobs.open()
    server.start()
    assert session(host).watch(going.run, [going.run], {"digest": "x"}) is ExitCode.PASS


def test_a_server_that_stops_answering_is_noticed_within_the_call_s_deadline(
    sshd_at: Make, laptop: Any, enrolled: Make, eventually: Make
) -> None:
    import os
    import signal

    from dispatch.transport.link import LinkLostError

    server = sshd_at()
    transport = open_transport(enrolled(server), laptop.places)
    transport.call("probe", {})
    sessions = server.sessions()
    for pid in sessions:
        os.kill(pid, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        with pytest.raises(LinkLostError):
            transport.call("probe", {}, timeout=2.0)
        assert time.monotonic() - begin < 10
    finally:
        for pid in sessions:
            os.kill(pid, signal.SIGCONT)
    assert transport.call("probe", {}).result["root"]


def test_the_socket_notices_a_network_that_goes_silent(shared_sshd: Any, laptop: Any, enrolled: Make) -> None:
    from dispatch.hosts.address import resolve
    from dispatch.transport.dial import open_link

    host = enrolled(shared_sshd)
    link = open_link(host, resolve(host))
    assert isinstance(link, socket.socket)
    with link:
        assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 15_000
        assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 5


def test_ssh_s_own_configuration_is_honoured(shared_sshd: Any, laptop: Any, monkeypatch: Any, tmp_path: Path) -> None:
    from dispatch.hosts import address

    config = tmp_path / "ssh_config"
    (tmp_path / "more").write_text(f"Host farbox\n  HostName 127.0.0.1\n  Port {shared_sshd.port}\n  User somebody\n")
    config.write_text(f"Include {tmp_path}/more\nHost *\n  IdentityFile {shared_sshd.key}\n  ProxyJump none\n")
    client = tmp_path / "ssh"
    client.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {config} "$@"\n')
    client.chmod(0o755)
    monkeypatch.setattr(address.shutil, "which", lambda name: str(client))
    found = address.resolve(Host(name="farbox", address="farbox"))
    assert (found.hostname, found.port, found.user) == ("127.0.0.1", shared_sshd.port, "somebody")
    assert found.identities == (str(shared_sshd.key),)
    assert found.proxy is None
    assert address.resolve(Host(name="farbox", address="farbox", user="me", port=22)).port == 22


def test_a_host_behind_a_jump_host_is_reached_with_its_own_pinned_key(
    shared_sshd: Any, laptop: Any, enrolled: Make, monkeypatch: Any, tmp_path: Path
) -> None:
    import os

    host = enrolled(shared_sshd)
    config = tmp_path / "ssh_config"
    config.write_text(
        f"Host jump\n  HostName 127.0.0.1\n  Port {shared_sshd.port}\n  StrictHostKeyChecking no\n"
        f"  UserKnownHostsFile /dev/null\nHost far\n  HostName 127.0.0.1\n  ProxyJump jump\n"
        f"Host *\n  User {getpass.getuser()}\n  IdentityFile {shared_sshd.key}\n  LogLevel ERROR\n"
    )
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {config} "$@"\n')
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    before = shared_sshd.logins()
    transport = open_transport(host.model_copy(update={"address": "far"}), laptop.places)
    try:
        assert transport.call("probe", {}).result["root"] == host.root
    finally:
        transport.close()
    assert shared_sshd.logins() == before + 2, "once at the jump host, once behind it"
