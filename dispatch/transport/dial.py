"""Dialling a host: directly or through a proxy command, until an SSH server has introduced itself, within deadlines."""

from __future__ import annotations

import random
import socket
import subprocess
import tempfile
import threading
import time

from dispatch.hosts.address import Address
from dispatch.hosts.inventory import Host
from dispatch.transport.failures import classified
from dispatch.transport.link import (
    CONNECT_SECONDS,
    CROWDED_SECONDS,
    GREETING_SECONDS,
    PROXY_SECONDS,
    RESOLVE_SECONDS,
    Link,
    ProxyError,
    Unanswered,
    keep_honest,
)

_LONGEST_GREETING = 16 * 1024


def open_link(host: Host, address: Address) -> Link:
    """A connection at whose other end an SSH server has introduced itself; LinkError where there is none."""
    queued = time.monotonic()
    while True:
        try:
            return _proxied(address.proxy) if address.proxy is not None else _direct(address)
        except Unanswered as error:
            # A queue, not a failure: the server says that others are being let in just now.
            if error.kind != "crowded" or time.monotonic() - queued > CROWDED_SECONDS:
                raise classified(host, address, error) from error
            time.sleep(random.uniform(0.1, 0.8))
        except (OSError, ProxyError) as error:
            raise classified(host, address, error) from error


def _direct(address: Address) -> Link:
    link = Link(_connected(address))
    try:
        keep_honest(link)
        _await_greeting(link, GREETING_SECONDS)
    except BaseException:
        link.close()
        raise
    return link


def _connected(address: Address) -> socket.socket:
    """A TCP connection to one of the addresses of the name, all of them together within the deadline."""
    deadline = time.monotonic() + CONNECT_SECONDS
    found = resolved(address.hostname, address.port)
    deadline = max(deadline, time.monotonic() + 1.0)  # a name that took all of it to be found is tried all the same
    errors: list[OSError] = []
    for position, (family, where) in enumerate(found):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        link = socket.socket(family, socket.SOCK_STREAM)
        try:
            link.settimeout(left / (len(found) - position))
            link.connect(where)
            return link
        except OSError as error:
            link.close()
            errors.append(error)
    # A refusal says more than silence does: somebody is there.
    errors.sort(key=lambda error: not isinstance(error, ConnectionRefusedError))
    raise errors[0] if errors else TimeoutError("timed out")


def resolved(name: str, port: int) -> list[tuple[int, tuple[object, ...]]]:
    """The addresses of a name; a resolver that does not answer is not waited for longer than any other part."""
    answers: list[list[tuple[int, tuple[object, ...]]]] = []
    errors: list[OSError] = []

    def ask() -> None:
        try:
            infos = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
            answers.append([(int(family), where) for family, _, _, _, where in infos])
        except (OSError, UnicodeError) as error:
            errors.append(error if isinstance(error, OSError) else socket.gaierror(socket.EAI_NONAME, str(error)))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(RESOLVE_SECONDS)
    if answers and answers[0]:
        return answers[0]
    if errors:
        raise errors[0]
    raise socket.gaierror(socket.EAI_AGAIN, f"no answer from the resolver within {RESOLVE_SECONDS:.0f} s")


def _await_greeting(link: Link, seconds: float) -> None:
    """Return when an SSH server's greeting can be read, without reading it; Unanswered says what came instead."""
    deadline = time.monotonic() + seconds
    said = b""
    while (left := deadline - time.monotonic()) > 0:
        link.settimeout(left)
        try:
            seen = link.recv(_LONGEST_GREETING, socket.MSG_PEEK)
        except TimeoutError:
            break
        except ConnectionError:
            seen = b""
        if not seen:
            raise Unanswered("crowded" if _crowded(said) else "closed", said)
        if any(line.startswith(b"SSH-") for line in seen.splitlines()[:100]):
            return
        if _crowded(seen):
            raise Unanswered("crowded", seen)
        if len(seen) >= _LONGEST_GREETING:
            raise Unanswered("not ssh", seen)
        if seen == said:  # peeking does not wait for more
            time.sleep(0.02)
        said = seen
    raise Unanswered("not ssh" if said else "silent", said)


def _crowded(said: bytes) -> bool:
    # The words of OpenSSH for a login beyond MaxStartups, and for an address that has to wait.
    return said.startswith((b"Exceeded MaxStartups", b"Not allowed at this time"))


def _proxied(argv: tuple[str, ...]) -> Link:
    """The host through a proxy command: a socket to the command's two streams."""
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryFile() as stderr:
        try:
            # A session of its own: Ctrl-C at the terminal must reach this command alone, never a call under way.
            proxy = subprocess.Popen(
                argv, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=stderr, start_new_session=True
            )
        except OSError as error:
            ours.close()
            raise ProxyError(f"{argv[0]}: {error.strerror}") from error
        finally:
            theirs.close()
        link = Link(ours, proxy)
        try:
            _await_greeting(link, PROXY_SECONDS)
        except Unanswered as error:
            link.close()
            stderr.seek(0)
            said = stderr.read(8192).decode("utf-8", "replace").strip()
            if error.kind == "silent" and not said:
                raise
            raise ProxyError(said) from error
        except BaseException:
            link.close()
            raise
        return link
