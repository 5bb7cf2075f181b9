"""A program's three streams through an SSH channel: bytes, deadlines that a slow link does not miss, and its status."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import paramiko

from dispatch.transport.call import Exchange
from dispatch.transport.link import DEAD_LINK_SECONDS, Link

_CHUNK = 2 * 1024 * 1024
"""Paramiko moves what it still holds at each reading of a part of it: many small ones cost a copy of all each."""
_PIECE = 32 * 1024
_MAX_OUTPUT = 256 * 1024 * 1024
_LOOK_SECONDS = 0.5
# How long nothing may move at all before a link is given up that no option of a socket watches over.
_SILENCE_SECONDS = DEAD_LINK_SECONDS + 3.0
# The same for bytes that the other side does not take: a busy disk there is not a broken link.
_STUCK_SECONDS = 60.0
_BEGIN = b"=LF-"


class NoWordError(Exception):
    """The program's first word did not come in time; ``said`` is what came instead."""

    def __init__(self, said: bytes) -> None:
        super().__init__("no first word")
        self.said = said


def pieces_of(channel: paramiko.Channel, link: Link, silence: float) -> Iterator[bytes]:
    """What a program writes, as it comes; TimeoutError where nothing does for so long, or the link is dead."""
    channel.settimeout(_LOOK_SECONDS)
    heard = time.monotonic()
    while True:
        try:
            piece = channel.recv(_CHUNK)
        except TimeoutError:
            if time.monotonic() - heard > silence:
                raise TimeoutError(f"nothing came for {silence:.0f} s") from None
            _look_for_life(link, link.heard)
            continue
        if not piece:
            return
        yield piece
        heard = time.monotonic()


def _look_for_life(link: Link, moved: float) -> None:
    """TimeoutError where a link that no option of a socket watches over has been still for too long."""
    still = time.monotonic() - max(link.heard, moved)
    if link.proxy is not None and still > _SILENCE_SECONDS:
        raise TimeoutError(f"not a sign of life for {still:.0f} s")


class Pipe:
    """One program's streams.

    The clock of a call runs while nothing moves: a request that is still on its way up, and a reply that is coming
    down, take as long as the link does. Before the reply begins, what comes is noise, and buys no time. The first word
    of a program that has one (the agent's) can be asked for within ``first_word`` seconds.
    """

    def __init__(
        self, channel: paramiko.Channel, link: Link, timeout: float, *, first_word: float | None = None
    ) -> None:
        self._first_word = first_word
        self.begun = False
        self._channel = channel
        self._link = link
        self._timeout = timeout
        self._moved = time.monotonic()
        self._fed = False
        self._said: list[bytes] = []
        self._stderr: list[bytes] = []

    def through(self, stdin: bytes) -> Exchange:
        """Write stdin, read both streams to their ends, take the exit status (None where the link ended first)."""
        channel = self._channel
        threads = [
            threading.Thread(target=self._feed, args=(stdin,), daemon=True),
            threading.Thread(target=self._drain, daemon=True),
        ]
        channel.settimeout(_LOOK_SECONDS)
        for thread in threads:
            thread.start()
        stdout = self._read()
        until = time.monotonic() + 5.0
        while not channel.status_event.wait(_LOOK_SECONDS):
            self._look()
            if time.monotonic() > until:
                raise TimeoutError("no exit status")
        for thread in threads:
            thread.join(timeout=5)
        status = channel.recv_exit_status()
        # -1 is Paramiko's word for "the link is gone", never a program's status.
        return Exchange(stdout, b"".join(self._stderr), None if status == -1 else status)

    def _read(self) -> bytes:
        chunks = self._said
        size = 0
        while True:
            try:
                chunk = self._channel.recv(_CHUNK)
            except TimeoutError:
                self._look()
                continue
            if not chunk:
                return b"".join(chunks)
            self.begun = self.begun or _BEGIN in (chunks[-1][-len(_BEGIN) :] if chunks else b"") + chunk
            chunks.append(chunk)
            size += len(chunk)
            if self.begun:
                self._moved = time.monotonic()
            if size > _MAX_OUTPUT:
                raise paramiko.SSHException(f"more than {_MAX_OUTPUT} bytes of output")
            self._look()

    def _look(self) -> None:
        """TimeoutError where the call or its link has been still for too long."""
        now = time.monotonic()
        if self._first_word is not None and self._fed and not self.begun and now - self._moved > self._first_word:
            raise NoWordError(b"".join(self._said))
        if self._fed and now - self._moved > self._timeout:
            raise TimeoutError(f"no whole reply within {self._timeout:.0f} s")
        if not self._fed and now - self._moved > max(self._timeout, _STUCK_SECONDS):
            raise TimeoutError(f"nothing of the request was taken for {now - self._moved:.0f} s")
        _look_for_life(self._link, self._moved)

    def _feed(self, stdin: bytes) -> None:
        # A thread of its own: a program that answers before it has read everything must not deadlock with us.
        channel, view = self._channel, memoryview(stdin)
        try:
            while view:
                try:
                    view = view[channel.send(bytes(view[:_PIECE])) :]
                    self._moved = time.monotonic()
                except TimeoutError:
                    continue  # no window: whether that is too long is for the reader to say, who closes the channel
            channel.shutdown_write()
        except (OSError, EOFError, paramiko.SSHException):
            pass  # the link is gone: the reader on the other side of this channel finds that out, and says so
        self._fed = True

    def _drain(self) -> None:
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            while True:
                try:
                    chunk = self._channel.recv_stderr(_CHUNK)
                except TimeoutError:
                    continue
                if not chunk:
                    return
                self._stderr.append(chunk)
