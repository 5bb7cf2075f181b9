"""SSH hosts: Fabric's connection, hardened, and its channels as byte pipes."""

from __future__ import annotations

import contextlib
import shlex
import threading
import time

import fabric  # type: ignore[import-untyped]
import paramiko

from dispatch.hosts.address import Address, resolve
from dispatch.hosts.inventory import Host
from dispatch.hosts.trust import HostKeyError, changed_key, pinned, unknown_key
from dispatch.places import Places
from dispatch.transport.call import Exchange, Transport
from dispatch.transport.link import BANNER_SECONDS, CONNECT_SECONDS, LinkLostError, classified, open_link
from latentforge.errors import RefusedError

_CHUNK = 256 * 1024
_MAX_OUTPUT = 256 * 1024 * 1024
_KEEPALIVE_SECONDS = 5


class _RefuseUnknown(paramiko.MissingHostKeyPolicy):
    """Refuses every key that is not pinned, before authentication."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        raise unknown_key(self._host, key)


class SshTransport(Transport):
    """One connection to a host, opened at the first call, reopened after a loss; a channel for each call."""

    def __init__(self, host: Host, places: Places, *, readonly: bool = False) -> None:
        super().__init__(host, readonly=readonly)
        self._places = places
        self._connection: fabric.Connection | None = None

    def exchange(self, argv: list[str], stdin: bytes, *, timeout: float) -> Exchange:
        """Run the program in a channel of its own, bytes in and bytes out, without a terminal."""
        transport = self._opened()
        deadline = time.monotonic() + timeout
        try:
            channel = transport.open_session(timeout=CONNECT_SECONDS)
            with contextlib.closing(channel):
                channel.settimeout(timeout)
                # The words are quoted for the login shell; values of the request never get near it.
                channel.exec_command(shlex.join(argv))
                return _pumped(channel, stdin, deadline)
        except (paramiko.SSHException, OSError, EOFError) as error:
            self.close()
            raise LinkLostError(
                f"{self.host.name}: the connection broke ({type(error).__name__}: {error})".rstrip(": ")
            ) from error

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None

    def _opened(self) -> paramiko.Transport:
        if self._connection is not None:
            transport = self._connection.transport
            if transport is not None and transport.is_active():
                assert isinstance(transport, paramiko.Transport)
                return transport
            self.close()
        self._connection = _connected(self.host, resolve(self.host), self._places)
        transport = self._connection.transport
        assert isinstance(transport, paramiko.Transport)
        return transport


def _connected(host: Host, address: Address, places: Places) -> fabric.Connection:
    """A Fabric connection that trusts pinned keys only and lists its own keys.

    Fabric reads no known_hosts and accepts every key; so its client is given ours and a policy that refuses, after
    construction and before ``open``.
    """
    keys = pinned(host, places)
    if host.keys and not keys:
        raise RefusedError(
            f"the pinned keys of {host.name} are in the inventory but not in {places.known_hosts(host.name)}",
            next=f"latentforge dispatch enrol {host.name} --replace",
        )
    link = open_link(host, address)
    connection = fabric.Connection(
        address.hostname,
        user=address.user,
        port=address.port,
        # Paramiko's reader of ~/.ssh/config is left out: OpenSSH's own has been asked already.
        config=fabric.Config(ssh_config=paramiko.SSHConfig(), overrides={"load_ssh_configs": False}),
        connect_timeout=int(CONNECT_SECONDS),
        connect_kwargs={
            "sock": link,
            "key_filename": list(address.identities),
            "look_for_keys": False,
            "allow_agent": host.identity is None,
            "banner_timeout": BANNER_SECONDS,
            "auth_timeout": CONNECT_SECONDS,
            "channel_timeout": CONNECT_SECONDS,
        },
    )
    client: paramiko.SSHClient = connection.client
    client.set_missing_host_key_policy(_RefuseUnknown(host))
    name = address.hostname if address.port == 22 else f"[{address.hostname}]:{address.port}"
    for key in keys:
        client.get_host_keys().add(name, key.get_name(), key)
    try:
        connection.open()
    except paramiko.BadHostKeyException as error:
        _give_up(connection, link)
        raise changed_key(host, error.key) from None
    except HostKeyError:
        _give_up(connection, link)
        raise
    except (paramiko.SSHException, OSError, EOFError) as error:
        _give_up(connection, link)
        raise classified(host, address, error) from error
    connection.transport.set_keepalive(_KEEPALIVE_SECONDS)
    return connection


def _give_up(connection: fabric.Connection, link: object) -> None:
    with contextlib.suppress(Exception):
        connection.client.close()
    with contextlib.suppress(Exception):
        link.close()  # type: ignore[attr-defined]


def _pumped(channel: paramiko.Channel, stdin: bytes, deadline: float) -> Exchange:
    """Write stdin, read both streams to their ends, take the exit status (None where the link ended first)."""
    stderr: list[bytes] = []

    def feed() -> None:
        # A thread of its own: a program that answers before it has read everything must not deadlock with us.
        try:
            channel.sendall(stdin)
            channel.shutdown_write()
        except (OSError, EOFError, paramiko.SSHException):
            pass  # the link is gone: the reader on the other side of this channel finds that out, and says so

    def drain() -> None:
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            while chunk := channel.recv_stderr(_CHUNK):
                stderr.append(chunk)

    threads = [threading.Thread(target=work, daemon=True) for work in (feed, drain)]
    for thread in threads:
        thread.start()
    stdout, size = [], 0
    while chunk := channel.recv(_CHUNK):
        stdout.append(chunk)
        size += len(chunk)
        if size > _MAX_OUTPUT:
            raise paramiko.SSHException(f"more than {_MAX_OUTPUT} bytes of output")
        if time.monotonic() > deadline:
            raise TimeoutError("no whole reply in time")
    if not channel.status_event.wait(max(0.0, min(5.0, deadline - time.monotonic()))):
        raise TimeoutError("no exit status")
    for thread in threads:
        thread.join(timeout=5)
    status = channel.recv_exit_status()
    # -1 is Paramiko's word for "the link is gone", never a program's status.
    return Exchange(b"".join(stdout), b"".join(stderr), None if status == -1 else status)
