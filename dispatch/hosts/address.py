"""Where a host really is: the inventory's words, completed by what the user's OpenSSH client would do."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dispatch.hosts.inventory import Host
from latentforge.errors import TransportError

_PLAIN = re.compile(r"[A-Za-z0-9_.:@%+\[\]-]+")


@dataclass(frozen=True)
class Address:
    """What a connection needs: host name, port, user, keys, and the command that leads there, if one does."""

    hostname: str
    port: int
    user: str
    identities: tuple[str, ...]
    proxy: tuple[str, ...] | None = None
    jump: str | None = None
    """The jump host that the proxy command goes by, in the user's words."""
    agent: str | None = None
    """The socket of the ssh-agent that may be asked."""
    identities_only: bool = False

    def __str__(self) -> str:
        return f"{self.user}@{self.hostname}" + (f":{self.port}" if self.port != 22 else "")


def resolve(host: Host) -> Address:
    """The address of a host.

    The OpenSSH client is asked for its effective settings (``ssh -G``), because Paramiko's own reader of ssh
    configuration knows neither ``Include`` nor ``Match``. The inventory's values go first.
    """
    settings = _openssh_settings(host)
    identities = [host.identity] if host.identity else settings.get("identityfile", [])
    files = tuple(str(path) for path in (Path(name).expanduser() for name in identities) if path.is_file())
    if host.identity and not files:
        raise TransportError(
            f"key file {host.identity!r} of host {host.name} does not exist",
            next=f"name another:  latentforge dispatch enrol {host.name} --identity FILE",
        )
    hostname = _one(settings, "hostname") or host.address
    port = host.port or int(_one(settings, "port") or 22)
    user = host.user or _one(settings, "user") or getpass.getuser()
    proxy, jump = _proxy(settings, hostname, port, user, host)
    return Address(
        hostname=hostname,
        port=port,
        user=user,
        identities=files,
        proxy=proxy,
        jump=jump,
        agent=_agent(settings),
        identities_only=_one(settings, "identitiesonly") == "yes",
    )


def _openssh_settings(host: Host) -> dict[str, list[str]]:
    client = shutil.which("ssh")
    if client is None:
        return {}
    if host.address.startswith("-"):
        raise TransportError(f"address {host.address!r} of host {host.name} looks like an option")
    asked = [client, "-G", *(["-p", str(host.port)] if host.port else []), *(["-l", host.user] if host.user else [])]
    try:
        answer = subprocess.run([*asked, "--", host.address], capture_output=True, timeout=5, check=True, text=True)
    except (subprocess.SubprocessError, OSError, UnicodeDecodeError):
        # A broken ssh_config must not stop a host that the inventory describes completely.
        return {}
    settings: dict[str, list[str]] = {}
    for line in answer.stdout.splitlines():
        name, _, value = line.partition(" ")
        settings.setdefault(name, []).append(value)
    return settings


def _one(settings: dict[str, list[str]], name: str) -> str | None:
    return settings[name][0] if settings.get(name) else None


def _agent(settings: dict[str, list[str]]) -> str | None:
    named = _one(settings, "identityagent") or "SSH_AUTH_SOCK"
    if named == "none":
        return None
    if named == "SSH_AUTH_SOCK" or named.startswith("$"):
        return os.environ.get(named.lstrip("$").strip("{}")) or None
    return named


# The first hop keeps watch over itself (the whole way is watched besides, from end to end) and says what it meets.
_JUMP = tuple(
    word
    for option in (
        "BatchMode=yes",
        "ConnectTimeout=5",
        "ServerAliveInterval=5",
        "ServerAliveCountMax=2",
        "LogLevel=INFO",
    )
    for word in ("-o", option)
)


def _proxy(
    settings: dict[str, list[str]], hostname: str, port: int, user: str, host: Host
) -> tuple[tuple[str, ...] | None, str | None]:
    """The command that leads to the host and the jump host it goes by, as OpenSSH would use them."""
    command, jump = _one(settings, "proxycommand"), _one(settings, "proxyjump")
    if jump and jump != "none":
        *before, last = jump.split(",")
        through = ("-J", ",".join(before)) if before else ()
        # A port after the name is understood in an URI only.
        target = last if "://" in last or ":" not in last else f"ssh://{last}"
        return ("ssh", *_JUMP, *through, "-W", f"[{hostname}]:{port}", target), jump
    if not command or command == "none":
        return None, None
    values = {"%": "%", "h": hostname, "n": host.address, "p": str(port), "r": user}
    for value in (hostname, host.address, user):
        if not _PLAIN.fullmatch(value):
            raise TransportError(f"{value!r} of host {host.name} cannot be handed to the shell of its ProxyCommand")
    expanded = re.sub(r"%(.)", lambda found: values.get(found[1], found[0]), command)
    return ("sh", "-c", f"exec {expanded}"), None
