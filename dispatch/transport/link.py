"""The socket below SSH: opened with deadlines, kept honest by keepalive, its failures told apart."""

from __future__ import annotations

import contextlib
import errno
import logging
import shlex
import socket
from typing import Literal

import paramiko

from dispatch.hosts.address import Address
from dispatch.hosts.inventory import Host
from latentforge.errors import TransportError

Failure = Literal[
    "name", "route", "refused", "host key", "authentication", "shell noise", "silent", "no python", "lost"
]

# What goes wrong is raised and told once; Paramiko's thread would print its own traceback beside it.
logging.getLogger("paramiko").addHandler(logging.NullHandler())

CONNECT_SECONDS = 6.0
# Shorter than the whole, or Paramiko gives up on the connection before it can say that there was no banner.
BANNER_SECONDS = 5.0
# A cut network is noticed within about this long: keepalive speaks up when nothing is in flight, and the user
# timeout bounds what is. Either of the two alone leaves a link that hangs for good.
DEAD_LINK_SECONDS = 15


class LinkError(TransportError):
    """A connection that could not be made or did not last; ``kind`` says at which door it failed."""

    def __init__(self, kind: Failure, what: str, *, next: str | None = None) -> None:
        super().__init__(what, next=next)
        self.kind = kind


class LinkLostError(LinkError):
    """The connection broke while a call was under way: whether the host acted on it is not known, so it is repeated."""

    def __init__(self, what: str) -> None:
        super().__init__("lost", what)


Link = socket.socket | paramiko.ProxyCommand


def open_link(host: Host, address: Address, *, timeout: float = CONNECT_SECONDS) -> Link:
    """A connected socket (or proxy command) to the host's SSH port."""
    if address.proxy is not None:
        command = address.proxy.replace("%h", address.hostname).replace("%p", str(address.port))
        return paramiko.ProxyCommand(command.replace("%r", address.user).replace("%%", "%"))
    try:
        link = socket.create_connection((address.hostname, address.port), timeout=timeout)
    except OSError as error:
        raise classified(host, address, error) from error
    keep_honest(link)
    return link


def keep_honest(link: socket.socket) -> None:
    """Make a silently cut network break the connection instead of hanging it."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, value in (
        ("TCP_KEEPIDLE", 5),
        ("TCP_KEEPALIVE", 5),  # macOS's name of the same
        ("TCP_KEEPINTVL", 5),
        ("TCP_KEEPCNT", 2),
        ("TCP_USER_TIMEOUT", DEAD_LINK_SECONDS * 1000),
    ):
        if hasattr(socket, option):
            with contextlib.suppress(OSError):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def classified(host: Host, address: Address, error: BaseException) -> LinkError:
    """What a failure to connect means, in words that say where to look."""
    where = f"{host.name} ({address})" if str(address) != host.name else host.name
    if isinstance(error, socket.gaierror):
        return LinkError(
            "name",
            f"{where}: the name {address.hostname!r} does not resolve",
            next=f"correct the address:  latentforge dispatch enrol {host.name} --address ADDRESS --replace",
        )
    if isinstance(error, ConnectionRefusedError):
        return LinkError(
            "refused",
            f"{where}: nothing listens on port {address.port}",
            next=f"is sshd running there? Another port:  latentforge dispatch enrol {host.name} --port PORT --replace",
        )
    if isinstance(error, paramiko.PasswordRequiredException):  # a kind of AuthenticationException: asked first
        return LinkError(
            "authentication", f"{where}: the key file is encrypted", next="load it into ssh-agent:  ssh-add"
        )
    if isinstance(error, paramiko.AuthenticationException):
        keys = ", ".join(address.identities) or "none"
        agent = "ssh-agent, " if host.identity is None else ""  # a key that was named is used, and no other
        named = f"-i {host.identity}.pub " if host.identity is not None else ""
        return LinkError(
            "authentication",
            f"{where}: no key of yours is accepted for user {address.user!r} (tried: {agent}key files: {keys})",
            next=f"ssh-copy-id {named}-p {address.port} {address.user}@{address.hostname}",
        )
    if isinstance(error, paramiko.SSHException) and "banner" in str(error).lower():
        return LinkError(
            "silent",
            f"{where}: port {address.port} is open but does not speak SSH ({error})",
            next=f"latentforge dispatch enrol {host.name} --port PORT --replace",
        )
    if isinstance(error, TimeoutError) or getattr(error, "errno", None) in (
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.ETIMEDOUT,
    ):
        return LinkError("route", f"{where}: no answer from the network ({error})", next=f"ping {address.hostname}")
    # What Paramiko says of a file that it cannot read as a key has no type of its own; a peer's offers have one.
    if type(error) is paramiko.SSHException and host.identity is not None and "key" in str(error).lower():
        return LinkError(
            "authentication",
            f"{where}: key file {host.identity!r} cannot be used ({error})",
            next=f"look whether it is a private key:  ssh-keygen -y -f {shlex.quote(host.identity)}",
        )
    return LinkError(
        "silent",
        f"{where}: SSH was not established ({type(error).__name__}: {error})",
        next=f"ssh -v -p {address.port} {address.user}@{address.hostname}   shows where it stops",
    )
