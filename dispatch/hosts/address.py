"""Where a host really is: the inventory's words, completed by what the user's OpenSSH client would do."""

from __future__ import annotations

import getpass
import os
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dispatch.hosts.inventory import Host
from latentforge.errors import TransportError

_ASK_SECONDS = 5.0
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
    certificates: tuple[str, ...] = ()
    """Certificates of the user's keys that the configuration names."""

    def __str__(self) -> str:
        name = f"[{self.hostname}]" if ":" in self.hostname and self.port != 22 else self.hostname
        return f"{self.user}@{name}" + (f":{self.port}" if self.port != 22 else "")


def resolve(host: Host) -> Address:
    """The address of a host.

    The OpenSSH client is asked for its effective settings (``ssh -G``), because Paramiko's own reader of ssh
    configuration knows neither ``Include`` nor ``Match``. The inventory's values go first.
    """
    settings = _openssh_settings(host)
    hostname = _one(settings, "hostname") or host.address
    port = host.port or int(_one(settings, "port") or 22)
    user = host.user or _one(settings, "user") or getpass.getuser()
    tokens = _tokens(host, hostname, port, user)
    identities = (
        [host.identity]
        if host.identity
        else [_expanded(name, tokens) for name in settings.get("identityfile", []) if name != "none"]
    )
    paths = [Path(name).expanduser() for name in identities]
    files = tuple(str(path) for path in paths if path.is_file())
    if host.identity and not files:
        raise TransportError(
            f"key file {host.identity!r} of host {host.name} does not exist",
            next=f"name another:  latentforge dispatch enrol {host.name} --identity FILE",
        )
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
        certificates=tuple(
            os.path.expanduser(_expanded(name, tokens))
            for name in settings.get("certificatefile", [])
            if name != "none"
        ),
    )


def _openssh_settings(host: Host) -> dict[str, list[str]]:
    client = shutil.which("ssh")
    config = Path("~/.ssh/config").expanduser()
    if client is None:
        if config.is_file():
            raise TransportError(
                f"there is no `ssh` on this machine, and without it {config} cannot be honoured",
                next="install OpenSSH's client (package openssh-client), then the same command again",
            )
        return {"identityfile": ["~/.ssh/id_rsa", "~/.ssh/id_ecdsa", "~/.ssh/id_ed25519"]}
    asked = ["-G", *(["-p", str(host.port)] if host.port else []), *(["-l", host.user] if host.user else [])]
    try:
        # No terminal and no input for what `Match exec` starts, and an end that does not wait for what it leaves.
        answer = subprocess.run(
            [client, *asked, "--", host.address], stdin=subprocess.DEVNULL, capture_output=True, timeout=_ASK_SECONDS
        )
    except subprocess.TimeoutExpired:
        said = f"it did not answer within {_ASK_SECONDS:.0f} s"
    except OSError as error:
        said = error.strerror or type(error).__name__
    else:
        if answer.returncode == 0:
            return _settings(answer.stdout.decode("utf-8", "surrogateescape"))
        said = answer.stderr.decode("utf-8", "replace").strip() or f"it ended with status {answer.returncode}"
    raise TransportError(
        f"your ssh configuration says nothing of {host.name}: `ssh -G` fails\n"
        + "\n".join(f"  {''.join(c if c.isprintable() else '�' for c in line)}" for line in said.splitlines()[:8]),
        next=f"mend {config}; to see it:  {shlex.join(['ssh', *asked, '--', host.address])}",
    )


def _settings(answer: str) -> dict[str, list[str]]:
    settings: dict[str, list[str]] = {}
    for line in answer.splitlines():
        name, _, value = line.partition(" ")
        settings.setdefault(name, []).append(value)
    return settings


def _tokens(host: Host, hostname: str, port: int, user: str) -> dict[str, str]:
    """What OpenSSH puts in place of ``%`` and a letter, which ``ssh -G`` leaves in names of key files and proxies."""
    here = socket.gethostname()
    return {
        "%": "%",
        "d": os.path.expanduser("~"),
        "h": hostname,
        "i": str(os.getuid()),
        "k": host.address,
        "L": here.partition(".")[0],
        "l": here,
        "n": host.address,
        "p": str(port),
        "r": user,
        "u": getpass.getuser(),
    }


def _expanded(text: str, tokens: Mapping[str, str]) -> str:
    text = re.sub(r"%(.)", lambda found: tokens.get(found[1], found[0]), text)
    return re.sub(r"\$\{(\w+)\}", lambda found: os.environ.get(found[1], found[0]), text)


def _one(settings: dict[str, list[str]], name: str) -> str | None:
    return settings[name][0] if settings.get(name) else None


def _agent(settings: dict[str, list[str]]) -> str | None:
    named = _one(settings, "identityagent") or "SSH_AUTH_SOCK"
    if named == "none":
        return None
    if named == "SSH_AUTH_SOCK" or named.startswith("$"):
        return os.environ.get(named.lstrip("$").strip("{}")) or None
    return os.path.expanduser(named)


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
    if _one(settings, "proxyusefdpass") == "yes":
        raise TransportError(
            f"ProxyUseFdpass of your ssh configuration, for {host.name}, is nothing that LatentForge can use",
            next="a ProxyCommand that carries the bytes itself, or ProxyJump",
        )
    tokens = _tokens(host, hostname, port, user)
    values = {letter: tokens[letter] for letter in "%hnpr"}
    for value in (hostname, host.address, user):
        if not _PLAIN.fullmatch(value):
            raise TransportError(f"{value!r} of host {host.name} cannot be handed to the shell of its ProxyCommand")
    expanded = re.sub(r"%(.)", lambda found: values.get(found[1], found[0]), command)
    return ("sh", "-c", f"exec {expanded}"), None
