"""Limits of a server are queues, not failures; one host's trouble is not another's; a jump host is part of the way."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.hosts.address import Address
from dispatch.transport import dial
from dispatch.transport.link import LinkError
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]

pytestmark = pytest.mark.sshd


def all_at_once(works: list[Callable[[], Any]], seconds: float = 90) -> list[Any]:
    """What each of some calls gives or raises, called at the same time."""
    answers: list[Any] = [None] * len(works)

    def work(position: int) -> None:
        try:
            answers[position] = works[position]()
        except Exception as error:
            answers[position] = error

    threads = [threading.Thread(target=work, args=(position,)) for position in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    return answers


@pytest.mark.fault(row=38)
def test_calls_beyond_maxsessions_wait_for_each_other_on_one_connection(
    sshd_here: Make, trusted: Make, reached: Make
) -> None:
    server = sshd_here(options="MaxSessions 2")
    transport = reached(trusted(server))
    program = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(0.3); print(1)"]
    answers = all_at_once([lambda: transport.exchange(program, b"", timeout=60).stdout] * 8)
    assert answers == [b"1\n"] * 8
    assert server.logins() == 1


@pytest.mark.fault(row=38)
def test_logins_beyond_maxstartups_queue(sshd_here: Make, trusted: Make, reached: Make, eventually: Make) -> None:
    server = sshd_here(options="MaxStartups 3")
    host = trusted(server)
    idle: list[socket.socket] = []
    for _ in range(20):  # let in this far, and not a word further, until nobody else is
        one = socket.create_connection((server.address, server.port))
        if not one.recv(64).startswith(b"SSH-"):
            break
        idle.append(one)
    one.close()
    assert len(idle) <= 3

    def leave() -> None:
        met = server.log.read_text().count("past MaxStartups")
        eventually(lambda: server.log.read_text().count("past MaxStartups") > met, "the limit is met")
        for one in idle:
            one.close()

    *answers, left = all_at_once(
        [*[lambda: reached(host).exchange(["echo", "in"], b"", timeout=60).stdout] * 6, leave],
    )
    assert left is None, left
    assert answers == [b"in\n"] * 6
    assert server.logins() == 6


@pytest.mark.fault(row=37)
def test_of_many_hosts_a_dead_one_and_a_slow_one_hold_nobody_up(
    wire: Make, sshd_here: Make, trusted: Make, reached: Make, impostor: Make
) -> None:
    link = wire()
    link.slow(64)
    servers = [sshd_here() for _ in range(6)]
    hosts = [trusted(server, f"box{number}") for number, server in enumerate(servers)]
    hosts.append(trusted(sshd_here(wire=link), "slow"))
    hosts.append(hosts[0].model_copy(update={"port": impostor(b"")}))
    took: dict[str, float] = {}
    begin = time.monotonic()

    def probe(host: Any) -> Any:
        try:
            return reached(host).call("probe", {}).result["root"]
        finally:
            took[f"{host.name}:{host.port}"] = time.monotonic() - begin

    *answers, dead = all_at_once([lambda host=host: probe(host) for host in hosts])
    assert answers == [hosts[0].root] * 7, answers
    assert isinstance(dead, LinkError)
    assert dead.kind == "silent"
    quick = [took[f"{host.name}:{host.port}"] for host in hosts[:6]]
    assert max(quick) < took[f"slow:{hosts[6].port}"], "nobody waited for the slow one"


def test_the_loopback_of_ipv6_is_an_address_like_any_other(
    sshd_here: Make, laptop: Any, tmp_path: Path, enrolled: Make, reached: Make
) -> None:
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 on this machine")
    server = sshd_here(address="::1")
    host = enrolled(server)
    assert host.address == "::1"
    assert reached(host).call("probe", {}).result["root"] == host.root


def jump_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    config = tmp_path / "ssh_config"
    config.write_text(text)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {config} "$@"\n')
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_jump_host_with_a_port_in_its_name_leads_to_the_host_and_every_fault_of_the_way_is_named(
    sshd_here: Make, trusted: Make, reached: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jump, far = sshd_here(), sshd_here()
    user = trusted(jump).user
    common = f"  IdentityFile {jump.key}\n  IdentitiesOnly yes\n"
    quiet = "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    jump_config(
        tmp_path,
        monkeypatch,
        f"Host far\n  HostName 127.0.0.1\n  Port {far.port}\n  ProxyJump {user}@127.0.0.1:{jump.port}\n"
        f"Host nowhere\n  ProxyJump no-such-jump.invalid\n"
        f"Host untrusted\n  HostName 127.0.0.1\n  Port {far.port}\n  ProxyJump strict\n"
        f"Host closed\n  HostName 127.0.0.1\n  Port 9\n  ProxyJump {user}@127.0.0.1:{jump.port}\n"
        f"Host command\n  HostName 127.0.0.1\n  Port {far.port}\n  ProxyCommand ssh -W %h:%p through\n"
        f"Host broken\n  ProxyCommand echo no way >&2; exit 1\n"
        f"Host through\n  HostName 127.0.0.1\n  Port {jump.port}\n{common}{quiet}"
        f"Host strict\n  HostName 127.0.0.1\n  Port {jump.port}\n  StrictHostKeyChecking yes\n"
        f"  UserKnownHostsFile /dev/null\n"
        f"Host 127.0.0.1\n{common}{quiet}",
    )
    host = trusted(far, port=None)

    def through(name: str) -> Any:
        return reached(host.model_copy(update={"address": name})).call("probe", {}).result["root"]

    names = ["far", "command", "nowhere", "untrusted", "closed", "broken"]
    far_root, command_root, *faults = all_at_once([lambda name=name: through(name) for name in names])
    assert (far_root, command_root) == (host.root, host.root)
    assert jump.logins() == 3
    assert far.logins() == 2
    for fault in faults:
        assert isinstance(fault, LinkError), fault
        assert fault.code is ExitCode.TRANSPORT
    assert [fault.kind for fault in faults] == ["name", "unknown host key", "refused", "proxy"], [*map(str, faults)]
    assert "by way of no-such-jump.invalid" in str(faults[0])
    assert faults[0].next == "ssh no-such-jump.invalid true   must work by itself first"
    assert "no way" in str(faults[3])


@pytest.mark.parametrize(("offered", "taken"), [("aes128-ctr,aes256-gcm@openssh.com", 1), ("aes256-ctr", 0)])
def test_a_cipher_that_is_its_own_digest_is_taken_where_the_server_has_one(
    sshd_here: Make, trusted: Make, reached: Make, offered: str, taken: int
) -> None:
    transport = reached(trusted(sshd_here(options=f"Ciphers {offered}")))
    transport.call("probe", {})
    assert transport._connection.transport.remote_cipher == offered.split(",")[taken]


def test_a_name_that_took_all_the_time_to_be_found_is_tried_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "CONNECT_SECONDS", -1.0)  # used up when the addresses are known
    with socket.create_server(("127.0.0.1", 0)) as server:
        link = dial._connected(Address("127.0.0.1", server.getsockname()[1], "me", ()))
        link.close()
