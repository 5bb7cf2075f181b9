"""What a failure to connect means, in words that say where to look and what to type next."""

from __future__ import annotations

import errno
import re
import shlex
import socket

import paramiko

from dispatch.hosts.address import Address
from dispatch.hosts.inventory import Host
from dispatch.transport.keys import NoKeyError
from dispatch.transport.link import Failure, LinkError, ProxyError, Unanswered, told

_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ETIMEDOUT, errno.EADDRNOTAVAIL)
# What OpenSSH's client says when it is the one that connects, as the way through a jump host.
_PROXY_SAID: tuple[tuple[str, Failure], ...] = (
    (r"could not resolve|name or service not known", "name"),
    (r"remote host identification has changed", "changed host key"),
    (r"host key verification failed", "unknown host key"),
    (r"permission denied|too many authentication failures", "authentication"),
    (r"connection refused", "refused"),
    (r"no route to host|unreachable|timed out", "route"),
    (r"banner exchange|connection closed|connection reset", "closed"),
)


def classified(host: Host, address: Address, error: BaseException) -> LinkError:
    """The door at which a connection failed."""
    where = f"{host.name} ({address})" if str(address) != host.name else host.name
    if isinstance(error, ProxyError):
        return _through_proxy(where, address, error.said)
    if isinstance(error, socket.gaierror):
        slow = f" ({error.strerror})" if error.errno == socket.EAI_AGAIN else ""
        return LinkError(
            "name",
            f"{where}: the name {address.hostname!r} does not resolve{slow}",
            next=f"correct the address:  latentforge dispatch enrol {host.name} --address ADDRESS",
        )
    if isinstance(error, ConnectionRefusedError):
        return LinkError(
            "refused",
            f"{where}: nothing listens on port {address.port}",
            next=f"is sshd running there? Another port:  latentforge dispatch enrol {host.name} --port PORT",
        )
    if isinstance(error, Unanswered):
        return _unanswered(host, where, address, error)
    if isinstance(error, NoKeyError):
        return LinkError("authentication", f"{where}: {error}", next=error.next or _copy_id(host, address))
    if isinstance(error, paramiko.AuthenticationException):
        said = f" ({error})" if str(error) else ""
        return LinkError("authentication", f"{where}: no key of yours is accepted{said}", next=_copy_id(host, address))
    if isinstance(error, TimeoutError) or getattr(error, "errno", None) in _UNREACHABLE:
        return LinkError("route", f"{where}: no answer from the network ({error})", next=f"ping {address.hostname}")
    return LinkError(
        "key exchange",
        f"{where}: the server greets, but no encrypted connection comes about ({_story(error)})",
        next=f"{_ssh(address, '-v ')}   shows where it stops",
    )


def no_commands(host: Host, address: Address, why: str) -> LinkError:
    """An account that lets us in and runs nothing for us."""
    return LinkError(
        "no commands",
        f"{host.name}: {address.user!r} may log in there, but may not run commands ({why})",
        next=f"{_ssh(address)} true   must succeed and print nothing; or another user:  "
        f"latentforge dispatch enrol {host.name} --user USER",
    )


def stuck_shell(host: Host, address: Address, said: bytes, seconds: float) -> LinkError:
    """A login shell that neither runs our program nor ends."""
    return LinkError(
        "shell noise",
        f"{host.name}: logged in, but within {seconds:.0f} s the login shell did not come to run the agent; "
        f"it said: {told(said)}",
        next=f"{_ssh(address)} true   must end at once; look for what waits (`read`, `sleep`, a menu) in its rc files; "
        "or is the machine too busy to start a program?",
    )


def _unanswered(host: Host, where: str, address: Address, error: Unanswered) -> LinkError:
    port = f"latentforge dispatch enrol {host.name} --port PORT"
    if error.kind == "crowded":
        return LinkError(
            "crowded",
            f"{where}: too many logins are under way there ({told(error.said)})",
            next="the same command again in a minute; or MaxStartups in the host's sshd_config",
        )
    if error.kind == "closed":
        said = f" (it said {told(error.said)})" if error.said else ""
        return LinkError(
            "closed",
            f"{where}: port {address.port} takes the connection and closes it at once{said}",
            next="does a ban list there (fail2ban, hosts.deny, a firewall's limit) hold this machine's address? "
            f"{_ssh(address, '-v ')}   tries it",
        )
    if error.kind == "not ssh":
        return LinkError(
            "not ssh",
            f"{where}: what listens on port {address.port} does not speak SSH; it says {told(error.said)}",
            next=port,
        )
    return LinkError(
        "silent",
        f"{where}: port {address.port} is open but does not speak SSH: not a word came from it",
        next=f"is the machine overloaded, or is that another service's port?  {port}",
    )


def _through_proxy(where: str, address: Address, said: str) -> LinkError:
    kind: Failure = "proxy"
    for pattern, found in _PROXY_SAID:
        if re.search(pattern, said, re.IGNORECASE):
            kind = found
            break
    by = f"by way of {address.jump}" if address.jump else "through its ProxyCommand"
    words = f"which said {told(said.encode())}" if said else "which ended without a word"
    if address.jump and address.proxy:
        *options, last = address.proxy
        through = options[options.index("-J") : options.index("-J") + 2] if "-J" in options else []
        first = f"{shlex.join(['ssh', *through, last, 'true'])}   must work by itself first"
    else:
        first = f"try the command by itself:  {shlex.join(address.proxy or ())}"
    return LinkError(kind, f"{where}: not reached {by}, {words}", next=first)


def _copy_id(host: Host, address: Address) -> str:
    named = f"-i {shlex.quote(host.identity)}.pub " if host.identity is not None else ""
    return f"ssh-copy-id {named}-p {address.port} {address.user}@{address.hostname}"


def _ssh(address: Address, option: str = "") -> str:
    return f"ssh {option}-p {address.port} {address.user}@{address.hostname}"


def _story(error: BaseException) -> str:
    if str(error) == "No existing session":  # Paramiko's words for a negotiation that it gave up waiting for
        return "it does not answer the key exchange"
    return f"{type(error).__name__}: {error}".rstrip(": ")
