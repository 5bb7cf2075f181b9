"""SSH hosts: Fabric's connection, hardened, and its channels as byte pipes."""

from __future__ import annotations

import contextlib
import shlex
import socket
import sys
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import fabric  # type: ignore[import-untyped]
import paramiko

from dispatch import agent_package
from dispatch.hosts.address import Address, resolve
from dispatch.hosts.inventory import Host
from dispatch.hosts.trust import changed_key, pinned, unknown_key
from dispatch.places import Places
from dispatch.transport.ahead import Ahead
from dispatch.transport.call import CALL_SECONDS, Exchange, Transport
from dispatch.transport.dial import open_link
from dispatch.transport.failures import classified, no_commands, stuck_shell
from dispatch.transport.keys import Keys
from dispatch.transport.link import (
    AUTHENTICATION_SECONDS,
    EXCHANGE_SECONDS,
    GREETING_SECONDS,
    KEEPALIVE_SECONDS,
    HostKeyError,
    Link,
    LinkLostError,
)
from dispatch.transport.pipe import NoWordError, Pipe, pieces_of
from latentforge.errors import RefusedError

CHANNEL_SECONDS = 8.0
FIRST_WORD_SECONDS = 8.5
_CHUNK = 256 * 1024
_SHORT_TURN_SECONDS = 0.0005
_WINDOW = 8 * 1024 * 1024
_PACKET = 128 * 1024
"""The most that a packet of a channel that goes on may hold: what each costs here is paid a quarter as often."""
_TURN_SECONDS = 90.0
"""How long a channel that goes on waits for a session, where others of its kind have all that the server permits."""


class _RefuseUnknown(paramiko.MissingHostKeyPolicy):
    """Refuses every key that is not pinned, before authentication."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        raise unknown_key(self._host, key)


@dataclass(frozen=True)
class _Begun:
    """A program that runs in a session, and what it was given so far; to close the session ends it."""

    transport: paramiko.Transport
    link: Link
    address: Address
    channel: paramiko.Channel
    session: contextlib.ExitStack
    argv: list[str]
    sent: bytes = b""


class SshTransport(Transport):
    """One connection to a host, opened at the first call, reopened after a loss; a channel for each call.

    Calls may come from several threads: they share the connection, and wait for each other where the server permits
    fewer sessions than that.
    """

    def __init__(self, host: Host, places: Places, *, readonly: bool = False) -> None:
        super().__init__(host, readonly=readonly)
        self._places = places
        self._connection: fabric.Connection | None = None
        self._link: Link | None = None
        self._opening = threading.Lock()
        self._turn = threading.Lock()
        self._answered = False
        self._sessions = 0
        self._ended = threading.Condition()
        self._ahead: Ahead[_Begun | None] | None = None
        self._taking = threading.Lock()

    def ahead(self, verb: str) -> None:
        """Connect, and start the agent on the host, while the request for it is still being made here."""
        self._ahead = Ahead(lambda: self._sent_ahead(verb), self._close_all)

    def _sent_ahead(self, verb: str) -> _Begun | None:
        address = resolve(self.host)
        if address.proxy is not None:
            return None  # a command of its own, which whoever leaves early would leave behind
        patience = sys.getswitchinterval()
        # Each of the handshake's dozen short turns would wait that long for the interpreter that the imports keep busy.
        sys.setswitchinterval(_SHORT_TURN_SECONDS)
        try:
            begun = self._begun(self._argv, CALL_SECONDS, address)
        finally:
            sys.setswitchinterval(patience)
        stdin = agent_package.carried(verb)  # packed while the login shell there reads its rc files
        with self._lost(begun.transport):
            try:
                begun.channel.sendall(stdin)
            except TimeoutError:
                raise
            except OSError:
                pass  # the program has ended already: what it said is read where its answer is waited for
        return replace(begun, sent=stdin)

    def _prepared(self, argv: list[str], stdin: bytes) -> _Begun | None:
        """The program that was begun ahead, if this is the one, and its stdin so far the beginning of this."""
        with self._taking:
            if self._ahead is None:
                return None
            self._ahead.wait()
            ahead, self._ahead = self._ahead, None
            begun = ahead.result()
        if begun is not None and (begun.argv != argv or not stdin.startswith(begun.sent)):
            begun.session.close()
            return None
        return begun

    def exchange(self, argv: list[str], stdin: bytes, *, timeout: float) -> Exchange:
        """Run the program in a channel of its own, bytes in and bytes out, without a terminal."""
        begun = self._prepared(argv, stdin) or self._begun(argv, timeout)
        with self._lost(begun.transport), begun.session:
            # Once a host has answered, slowness is no reason to doubt its login shell.
            asks = argv[-1] == agent_package.BOOTSTRAP and not self._answered
            pipe = Pipe(begun.channel, begun.link, timeout, first_word=FIRST_WORD_SECONDS if asks else None)
            try:
                ended = pipe.through(stdin[len(begun.sent) :])
            except NoWordError as error:
                self._close(begun.transport)
                raise stuck_shell(self.host, begun.address, error.said, FIRST_WORD_SECONDS) from None
            self._answered = self._answered or pipe.begun
            return ended

    def _begun(self, argv: list[str], timeout: float, address: Address | None = None) -> _Begun:
        """The program, started in a session of its own; connected to the host first where that is not so yet."""
        transport, link, address = self._opened(address)
        with self._lost(transport), contextlib.ExitStack() as session:
            channel = session.enter_context(self._session(transport, address, timeout))
            # The words are quoted for the login shell; values of the request never get near it.
            self._started(channel, transport, address, shlex.join(argv))
            return _Begun(transport, link, address, channel, session.pop_all(), argv)

    @contextlib.contextmanager
    def _lost(self, transport: paramiko.Transport) -> Iterator[None]:
        """Raise what breaks the connection as such, and close it."""
        try:
            yield
        except (paramiko.SSHException, OSError, EOFError) as error:
            self._close(transport)
            raise LinkLostError(
                f"{self.host.name}: the connection broke ({type(error).__name__}: {error})".rstrip(": ")
            ) from error

    def pieces(self, argv: list[str], stdin: bytes, *, silence: float) -> Generator[bytes, None, Exchange]:
        """Run the program in a channel of its own, and yield what it writes; no more than a window of it waits here."""
        transport, link, address = self._opened()
        with self._lost(transport), self._session(transport, address, _TURN_SECONDS, window=_WINDOW) as channel:
            self._started(channel, transport, address, shlex.join(argv))
            channel.settimeout(silence)
            channel.sendall(stdin)
            channel.shutdown_write()
            yield from pieces_of(channel, link, silence)
            stderr = channel.recv_stderr(_CHUNK)
            if not channel.status_event.wait(5.0):
                raise TimeoutError("no exit status")
            status = channel.recv_exit_status()
            return Exchange(b"", stderr, None if status == -1 else status)

    def open(self) -> None:
        """Connect and log in, unless that was done."""
        self._opened()

    def close(self) -> None:
        """Close the connection; one that is still being made is closed when it is there, and not waited for."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.leave():
            self._close_all()

    def _close_all(self) -> None:
        self._close(None)

    def _close(self, broken: paramiko.Transport | None) -> None:
        """Close the connection, unless another thread has opened a new one in place of the broken one."""
        with self._opening:
            if self._connection is None or (broken is not None and self._connection.transport is not broken):
                return
            _give_up(self._connection, self._link)
            self._connection = self._link = None

    def _opened(self, address: Address | None = None) -> tuple[paramiko.Transport, Link, Address]:
        with self._opening:
            if self._connection is not None and not self._connection.transport.is_active():
                _give_up(self._connection, self._link)
                self._connection = None
            if self._connection is None:
                self._address = address or resolve(self.host)
                self._connection, self._link = _connected(self.host, self._address, self._places)
            transport = self._connection.transport
            assert isinstance(transport, paramiko.Transport)
            assert self._link is not None
            return transport, self._link, self._address

    @contextlib.contextmanager
    def _session(
        self, transport: paramiko.Transport, address: Address, timeout: float, *, window: int | None = None
    ) -> Iterator[paramiko.Channel]:
        """A channel of the connection; a server that permits no further one now is asked again when one has ended."""
        patience = time.monotonic() + timeout
        alone = time.monotonic() + 2.0
        while True:
            try:
                with self._turn:  # Paramiko mixes up the answers of two that open at once
                    channel = transport.open_session(
                        window_size=window,
                        max_packet_size=None if window is None else _PACKET,
                        timeout=CHANNEL_SECONDS,
                    )
                break
            except paramiko.ChannelException as error:
                with self._ended:
                    if self._sessions == 0 and time.monotonic() > alone:
                        raise no_commands(self.host, address, f"no session is opened: {error.text}") from None
                    if time.monotonic() > patience:
                        raise TimeoutError(f"no session was free within {timeout:.0f} s") from None
                    # The server counts a session until it has reaped its process, which nobody is told of.
                    self._ended.wait(0.2)
        with self._ended:
            self._sessions += 1
        try:
            yield channel
        finally:
            with contextlib.suppress(Exception):
                channel.close()
            with self._ended:
                self._sessions -= 1
                self._ended.notify_all()

    def _started(
        self, channel: paramiko.Channel, transport: paramiko.Transport, address: Address, command: str
    ) -> None:
        channel.settimeout(CHANNEL_SECONDS)
        try:
            channel.exec_command(command)
        except paramiko.SSHException:
            time.sleep(0.05)  # a broken connection closes its channels first, and says that it is broken next
            if not transport.is_active():
                raise
            raise no_commands(self.host, address, "the server refuses to run one") from None


def _transport(link: socket.socket, **more: Any) -> paramiko.Transport:
    """Paramiko's transport, to which AES-GCM comes first, where it has that: cipher and digest in one quick pass."""
    transport = paramiko.Transport(link, **more)
    options = transport.get_security_options()
    options.ciphers = sorted(options.ciphers, key=lambda name: "-gcm@" not in name)
    return transport


def _connected(host: Host, address: Address, places: Places) -> tuple[fabric.Connection, Link]:
    """A Fabric connection that trusts pinned keys only and lists its own keys.

    Fabric reads no known_hosts and accepts every key; so its client is given ours and a policy that refuses, after
    construction and before ``open``.
    """
    keys = pinned(host, places)
    if host.keys and not keys:
        raise RefusedError(
            f"the pinned keys of {host.name} are in the inventory but not in {places.known_hosts(host.name)}",
            next=f"latentforge dispatch enrol {host.name}",
        )
    link = open_link(host, address)
    connection = fabric.Connection(
        address.hostname,
        user=address.user,
        port=address.port,
        # Paramiko's reader of ~/.ssh/config is left out: OpenSSH's own has been asked already.
        config=fabric.Config(ssh_config=paramiko.SSHConfig(), overrides={"load_ssh_configs": False}),
        connect_timeout=int(EXCHANGE_SECONDS),
        connect_kwargs={
            "sock": link,
            "auth_strategy": Keys(host, address),
            "banner_timeout": GREETING_SECONDS,
            "auth_timeout": AUTHENTICATION_SECONDS,
            "channel_timeout": CHANNEL_SECONDS,
            "transport_factory": _transport,
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
    connection.transport.set_keepalive(KEEPALIVE_SECONDS)
    if link.proxy is not None:
        # No option of our socket reaches beyond the proxy: the host itself is asked for signs of life.
        threading.Thread(target=_ask_for_life, args=(connection.transport, link), daemon=True).start()
    return connection, link


def _ask_for_life(transport: paramiko.Transport, link: Link) -> None:
    while transport.is_active():
        time.sleep(1.0)
        if time.monotonic() - link.heard > KEEPALIVE_SECONDS:
            with contextlib.suppress(Exception):
                transport.global_request("keepalive@openssh.com", wait=True)


def _give_up(connection: fabric.Connection, link: Link | None) -> None:
    with contextlib.suppress(Exception):
        connection.client.close()
    if link is not None:
        with contextlib.suppress(Exception):
            link.close()
