"""A TCP relay in front of a real server that can be killed, as the server itself would be, and come back."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from urllib.parse import urlsplit


class Relay:
    """Passes bytes between 127.0.0.1:``port`` and ``upstream_url``. A context; at its end nothing of it is left."""

    def __init__(self, upstream_url: str) -> None:
        parts = urlsplit(upstream_url)
        assert parts.hostname is not None
        self._upstream = (parts.hostname, parts.port or 80)
        self._path = parts.path
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self.port = 0
        self.revive()

    @property
    def url(self) -> str:
        """What a client is given in the server's place; the same before and after a death."""
        return f"http://127.0.0.1:{self.port}{self._path}"

    @property
    def alive(self) -> bool:
        """Whether it passes anything."""
        return self._listener is not None

    def revive(self) -> None:
        """Listen, on the port that it had before."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        self._start(self._accept, self._listener)

    def kill(self) -> None:
        """Nobody listens any more, and every connection is reset in the middle of what it carries."""
        listener, self._listener = self._listener, None
        if listener is not None:
            _shut(listener)
        with self._lock:
            connections, self._open = list(self._open), set()
        for connection in connections:
            _shut(connection)

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *reason: object) -> None:
        self.kill()
        for thread in self._threads:
            thread.join()

    def _start(self, what: object, *arguments: socket.socket) -> None:
        thread = threading.Thread(target=what, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(self._upstream)
            except OSError:
                return
            with self._lock:
                self._open |= {client, server}
            self._start(self._pump, client, server)
            self._start(self._pump, server, client)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for one in (source, sink):
            _shut(one)
            with self._lock:
                self._open.discard(one)


def _shut(one: socket.socket) -> None:
    # To close a socket does not wake who waits on it; to shut it down does.
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
