"""Where a host is, by the user's own OpenSSH configuration: honoured as OpenSSH does, never passed over silently."""

from __future__ import annotations

import getpass
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.hosts import address
from dispatch.hosts.address import resolve
from dispatch.hosts.inventory import Host
from dispatch.transport.failures import classified
from dispatch.transport.link import ProxyError
from latentforge.errors import TransportError

Configured = Callable[[str], None]
pytestmark = pytest.mark.skipif(shutil.which("ssh") is None, reason="no OpenSSH client on this machine")


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configured:
    """Make the real client read this configuration as the user's (it takes the home of the passwd file, not $HOME)."""
    real = shutil.which("ssh")

    def write(text: str) -> None:
        (tmp_path / "ssh_config").write_text(text)
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "ssh").write_text(f'#!/bin/sh\nexec {real} -F {tmp_path}/ssh_config "$@"\n')
        (folder / "ssh").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return write


def test_key_files_are_found_by_the_tokens_and_variables_of_the_configuration(
    configured: Configured, laptop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [laptop.home / name for name in ("at-10.0.0.7-me", "home", "variable", "tilde")]
    for key in keys:
        key.touch()
    monkeypatch.setenv("KEYS", str(laptop.home))
    configured(
        f"Host far\n  HostName 10.0.0.7\n  User me\n  IdentityFile {laptop.home}/at-%h-%r\n  IdentityFile %d/home\n"
        "  IdentityFile ${KEYS}/variable\n  IdentityFile ~/tilde\n  IdentityFile ~/absent\n  CertificateFile %d/cert\n"
    )
    found = resolve(Host(name="far", address="far"))
    assert found.identities == tuple(str(key) for key in keys)
    assert found.certificates == (str(laptop.home / "cert"),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Host *\n  Nonsense yes\n", ["Bad configuration option: nonsense", "ssh_config: line 2"]),
        ("Host *\n  Port many\n", ["line 2"]),
    ],
)
def test_a_broken_ssh_configuration_is_an_error_in_the_words_of_ssh(
    configured: Configured, text: str, words: list[str]
) -> None:
    configured(text)
    with pytest.raises(TransportError) as refused:
        resolve(Host(name="far", address="far", port=2222, user="me", identity=None))
    for word in words:
        assert word in str(refused.value)
    assert "ssh -G -p 2222 -l me -- far" in str(refused.value.next)


def test_a_configuration_that_asks_something_that_never_answers_is_an_error(
    configured: Configured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(address, "_ASK_SECONDS", 0.3)
    configured(f'Match exec "touch {tmp_path}/asked; read never; exec sleep 2"\n  User me\n')
    with pytest.raises(TransportError, match=r"did not answer within"):
        resolve(Host(name="far", address="far"))
    assert (tmp_path / "asked").exists()


def test_without_a_client_a_configuration_is_not_passed_over(laptop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address.shutil, "which", lambda name: None)
    (laptop.home / ".ssh").mkdir()
    (laptop.home / ".ssh/id_ed25519").touch()
    assert resolve(Host(name="far", address="far")) == address.Address(
        "far", 22, getpass.getuser(), (str(laptop.home / ".ssh/id_ed25519"),)
    )
    (laptop.home / ".ssh/config").touch()
    with pytest.raises(TransportError, match="no `ssh` on this machine"):
        resolve(Host(name="far", address="far"))


def test_what_the_configuration_says_of_host_keys_changes_nothing(configured: Configured) -> None:
    """Our pins are the only ones: these options of OpenSSH's are its own business."""
    plain = "Host far\n  HostName 10.0.0.7\n"
    configured(plain)
    expected = resolve(Host(name="far", address="far"))
    configured(
        f"{plain}  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  HostKeyAlias other\n"
        "  HashKnownHosts yes\n  UpdateHostKeys yes\n  VerifyHostKeyDNS yes\n  ControlMaster auto\n"
    )
    assert resolve(Host(name="far", address="far")) == expected


@pytest.mark.parametrize(
    ("jump", "through", "last"),
    [
        ("j1", (), "j1"),
        ("me@j1:2200", (), "ssh://me@j1:2200"),
        ("j1,you@j2", ("-J", "j1"), "you@j2"),
        ("j1,j2:22,[::1]:23", ("-J", "j1,j2:22"), "'ssh://[::1]:23'"),
    ],
)
def test_jump_hosts_are_gone_through_in_their_order_and_the_command_to_try_is_one_that_ssh_takes(
    configured: Configured, jump: str, through: tuple[str, ...], last: str
) -> None:
    configured(f"Host far\n  HostName fe80::7\n  ProxyJump {jump}\n")
    found = resolve(Host(name="far", address="far"))
    assert found.proxy is not None
    assert found.proxy[-3 - len(through) :] == (*through, "-W", "[fe80::7]:22", last.strip("'"))
    assert "BatchMode=yes" in found.proxy
    told = classified(Host(name="far", address="far"), found, ProxyError("Host key verification failed.\r\n"))
    assert told.kind == "unknown host key"
    assert "said 'Host key verification failed.'" in str(told)
    assert told.next == f"{' '.join(['ssh', *through, last, 'true'])}   must work by itself first"


def test_a_proxy_that_hands_over_a_socket_is_refused_by_its_name(configured: Configured) -> None:
    configured("Host far\n  ProxyUseFdpass yes\n  ProxyCommand /bin/false\n")
    with pytest.raises(TransportError, match="ProxyUseFdpass"):
        resolve(Host(name="far", address="far"))
