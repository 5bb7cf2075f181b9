"""The connection between the hosts of a run: messages in their order, and a beat that says that somebody is there."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from latentforge.errors import CrashedError, LatentForgeError
from latentforge.train.stopping import whole
from latentforge.verdicts import ExitCode

BEAT_SECONDS = 2.0
CHUNK = 1 << 20
"""Bytes of a file in one message: little enough to be taken within the deadline over a slow link."""
_HEAD = struct.Struct("!4sII")
_MAGIC = b"LFH1"
_LARGEST = 64 << 20
_WAITING = 8
_LINGER_SECONDS = 3.0
_RESUME = "see what became of it, then go on from the last checkpoint:  latentforge dispatch go --attempt next"


class HostLost(CrashedError):
    """Another host of the run is gone: it is silent, or its end of the connection is closed."""


@dataclass(frozen=True)
class Message:
    """What another host told: of a ``kind``, with ``fields``, and bytes of a file."""

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    content: bytes = b""


class Link:
    """One end of the connection to the host ``peer``. A thread reads all that it tells, another beats; both end with
    :meth:`close`.

    A host that tells nothing, not even a beat, for ``deadline`` seconds while it is listened to is lost, and so is one
    that takes nothing for so long.
    """

    def __init__(self, peer: str, connection: socket.socket, deadline: float) -> None:
        self.peer, self.deadline = peer, deadline
        self._connection = connection
        self._connection.settimeout(deadline)
        self._sending = threading.Lock()
        self._arrived: queue.Queue[Message | None] = queue.Queue(_WAITING)
        self._lost: HostLost | None = None
        self.silent = False
        """Whether it was lost by its silence, so that nothing closed the connections of other processes."""
        self._closed = threading.Event()
        self._heard = time.monotonic()
        with contextlib.suppress(OSError):  # not every kind of socket has it
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Daemons, so that a process that has to end does not wait for a host that is gone.
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._read, self._beat)]
        for thread in self._threads:
            thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether nothing more can come of it."""
        return self._lost is not None

    def tell(self, kind: str, content: bytes | memoryview = b"", /, **fields: Any) -> None:
        """Send a message. HostLost where it is not taken within the deadline."""
        said = json.dumps([kind, fields]).encode()
        try:
            with whole(), self._sending:
                self._connection.sendall(_HEAD.pack(_MAGIC, len(said), len(content)) + said)
                if content:
                    self._connection.sendall(content)
        except TimeoutError as error:
            raise self._lose(f"took nothing for {self.deadline:g} s", silent=True) from error
        except OSError as error:
            raise self._lose(f"closed its connection ({error.strerror or error})") from error

    def arrived(self) -> list[Message]:
        """What it told since this was asked last, without waiting. HostLost once it is lost and all that it told before
        has been given."""
        found: list[Message] = []
        while True:
            try:
                message = self._arrived.get_nowait()
            except queue.Empty:
                return found
            if message is None:
                self._arrived.put(None)
                if not found:
                    raise self._gone()
                return found
            found.append(message)

    def take(self, *, within: float | None = None) -> Message:
        """The next message, waited for; HostLost where it is lost, or only beats for ``within`` seconds."""
        try:
            message = self._arrived.get(timeout=within)
        except queue.Empty:
            raise HostLost(f"host {self.peer} beats, and told nothing else for {within:g} s", next=_RESUME) from None
        if message is None:
            self._arrived.put(None)
            raise self._gone()
        return message

    def close(self) -> None:
        """End the connection. What was told last arrives: the other side is listened to until it closes its end too, or
        for a few seconds, since a socket that is closed with something unread takes back what it sent."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
        self._threads[0].join(_LINGER_SECONDS)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _gone(self) -> HostLost:
        assert self._lost is not None
        return HostLost(str(self._lost), next=self._lost.next)

    def _lose(self, why: str, *, silent: bool = False) -> HostLost:
        if self._lost is None:
            self.silent = silent
            self._lost = HostLost(f"host {self.peer} {why}", next=_RESUME)
        return self._lost

    def _read(self) -> None:
        try:
            while True:
                magic, said, content = _HEAD.unpack(self._exactly(_HEAD.size))
                if magic != _MAGIC or said > _LARGEST or content > CHUNK:
                    self._lose("sent what is no message of this version")
                    break
                kind, fields = json.loads(self._exactly(said))
                if not isinstance(kind, str) or not isinstance(fields, dict):
                    raise ValueError
                message = Message(kind, fields, self._exactly(content))
                if message.kind != "beat" and not self._closed.is_set():
                    self._arrived.put(message)
        except TimeoutError:
            self._lose(f"was not heard for {time.monotonic() - self._heard:.3g} s", silent=True)
        except (OSError, EOFError):
            self._lose("closed its connection: its run ended, or was killed")
        except (ValueError, TypeError, RecursionError):
            self._lose("sent what is no message of this version")
        finally:
            self._arrived.put(None)

    def _exactly(self, size: int) -> bytes:
        """So many bytes. Only here is the peer listened to: while this side has not yet taken what it told, its silence
        is not its own."""
        taken = bytearray(size)
        view = memoryview(taken)
        at, self._heard = 0, time.monotonic()
        while at < size:
            count = self._connection.recv_into(view[at:])
            if not count:
                raise EOFError
            at, self._heard = at + count, time.monotonic()
        return bytes(taken)

    def _beat(self) -> None:
        while not self._closed.wait(min(BEAT_SECONDS, self.deadline / 3)):
            try:
                self.tell("beat")
            except HostLost:
                return


def refuse_ended(link: Link, message: Message) -> None:
    """Raise what the run of the other host ended by, where that is what it tells."""
    if message.kind == "end":
        code = ExitCode(message.fields["code"])
        what = f"host {link.peer} ended with exit code {int(code)} ({code.name.lower()}): {message.fields['reason']}"
        raise LatentForgeError(what, next=message.fields["next"], code=code)
