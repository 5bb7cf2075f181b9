"""Where a host really is: the inventory's words, completed by what the user's OpenSSH client would do."""

from __future__ import annotations

import getpass
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dispatch.hosts.inventory import Host
from latentforge.errors import TransportError


@dataclass(frozen=True)
class Address:
    """What a connection needs: host name, port, user, key files, and a proxy command or None."""

    hostname: str
    port: int
    user: str
    identities: tuple[str, ...]
    proxy: str | None = None

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
    return Address(
        hostname=_one(settings, "hostname") or host.address,
        port=host.port or int(_one(settings, "port") or 22),
        user=host.user or _one(settings, "user") or getpass.getuser(),
        identities=files,
        proxy=_proxy(settings),
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


def _proxy(settings: dict[str, list[str]]) -> str | None:
    command, jump = _one(settings, "proxycommand"), _one(settings, "proxyjump")
    if jump and jump != "none":
        *before, last = jump.split(",")
        return " ".join(
            ["ssh", "-o", "BatchMode=yes", *(["-J", ",".join(before)] if before else []), "-W", "%h:%p", last]
        )
    return command if command and command != "none" else None
