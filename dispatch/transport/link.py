"""The socket below SSH: its deadlines, the names of its failures, and the keepalive that ends a silent one."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import time
from typing import Literal

from latentforge.errors import TransportError

# fmt: off
Failure = Literal[
    "name", "route", "refused",                      # before anything listens
    "silent", "not ssh", "closed", "crowded",        # before SSH is spoken
    "key exchange", "unknown host key", "changed host key", "authentication",
    "no commands", "shell noise", "no python",       # logged in
    "proxy", "lost",
]
# fmt: on

# What goes wrong is raised and told once; Paramiko's thread would print its own traceback beside it.
logging.getLogger("paramiko").addHandler(logging.NullHandler())

# Whichever of them is used up, a connection that cannot be had has said so within ten seconds.
RESOLVE_SECONDS = 5.0
CONNECT_SECONDS = 5.0
GREETING_SECONDS = 5.0
PROXY_SECONDS = 9.0
EXCHANGE_SECONDS = 8.0
AUTHENTICATION_SECONDS = 8.0
# A server that lets in no more for now (MaxStartups) is waited for: that is a queue.
CROWDED_SECONDS = 30.0
# A cut network is noticed within about this long: keepalive speaks up when nothing is in flight, and the user
# timeout bounds what is. Either of the two alone leaves a link that hangs for good.
DEAD_LINK_SECONDS = 15
KEEPALIVE_SECONDS = 5

_SHOWN = 400


class LinkError(TransportError):
    """A connection that could not be made or did not last; ``kind`` says at which door it failed."""

    def __init__(self, kind: Failure, what: str, *, next: str | None = None) -> None:
        super().__init__(what, next=next)
        self.kind = kind


class LinkLostError(LinkError):
    """The connection broke while a call was under way: whether the host acted on it is not known, so it is repeated."""

    def __init__(self, what: str) -> None:
        super().__init__("lost", what)


class HostKeyError(TransportError):
    """A host key that is unknown or not the pinned one; raised before anything is authenticated or sent.

    No LinkError: asking again does not help, so nothing that waits for a link to come back waits for this.
    """

    def __init__(self, kind: Failure, what: str, *, next: str) -> None:
        super().__init__(what, next=next)
        self.kind = kind


def told(said: bytes) -> str:
    """What a machine said, fit to be shown: printable, and not too long."""
    text = said.decode("utf-8", "replace").replace("\r\n", "\n").strip()
    text = "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…") if text else "nothing"


class Unanswered(Exception):
    """What came instead of an SSH server's greeting: nothing, an end, or other words."""

    def __init__(self, kind: Failure, said: bytes = b"") -> None:
        super().__init__(kind)
        self.kind: Failure = kind
        self.said = said


class Link(socket.socket):
    """A connected socket that knows when it last heard something, and the proxy command behind it, if there is one."""

    def __init__(self, opened: socket.socket, proxy: subprocess.Popen[bytes] | None = None) -> None:
        super().__init__(opened.family, opened.type, opened.proto, fileno=opened.detach())
        self.heard = time.monotonic()
        self.proxy = proxy
        self._acknowledge = hasattr(socket, "TCP_QUICKACK") and self.family in (socket.AF_INET, socket.AF_INET6)

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As a socket's; what comes is a sign of life."""
        data = super().recv(size, flags)
        if data:
            self.heard = time.monotonic()
        if self._acknowledge:
            # sshd holds back a small answer until its last one is acknowledged, which the kernel puts off by 40 ms:
            # that long took every session's beginning. The kernel takes this back by itself, so it is said each time.
            with contextlib.suppress(OSError):
                self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return data

    def close(self) -> None:
        """Close the socket; a proxy command ends with it."""
        super().close()
        if self.proxy is not None and self.proxy.poll() is None:
            with contextlib.suppress(OSError):
                self.proxy.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.proxy.wait(2)
            if self.proxy.poll() is None:
                self.proxy.kill()
                self.proxy.wait()


class ProxyError(Exception):
    """A proxy command that ended before the host's SSH server was heard; ``said`` is what it wrote to stderr."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = said


def keep_honest(link: socket.socket) -> None:
    """Make a silently cut network break the connection instead of hanging it."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_SECONDS),
        ("TCP_KEEPALIVE", KEEPALIVE_SECONDS),  # macOS's name of the same
        ("TCP_KEEPINTVL", KEEPALIVE_SECONDS),
        ("TCP_KEEPCNT", 2),
        ("TCP_USER_TIMEOUT", DEAD_LINK_SECONDS * 1000),
    ):
        if hasattr(socket, option):
            with contextlib.suppress(OSError):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
