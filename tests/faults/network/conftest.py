"""What the tests of the network share: hosts that are trusted at once, and servers that are none."""

from __future__ import annotations

import contextlib
import getpass
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest

from dispatch.hosts.inventory import Host
from dispatch.hosts.trust import pin


def key_of(public: Path) -> paramiko.PKey:
    """The key in a .pub file."""
    entry = paramiko.hostkeys.HostKeyEntry.from_line(f"name {' '.join(public.read_text().split()[:2])}")
    assert entry is not None
    assert entry.key is not None
    return entry.key


@pytest.fixture
def trusted(laptop: Any, tmp_path: Path) -> Callable[..., Host]:
    """A host with the server's own keys pinned, as enrolling would pin them."""

    def trust(server: Any, name: str = "box", *, keys: tuple[str, ...] | None = None, **fields: Any) -> Host:
        described = {
            "address": server.address,
            "port": server.port,
            "user": getpass.getuser(),
            "identity": str(server.key),
            "root": str(tmp_path / "remote"),
            "python": sys.executable,
            **fields,
        }
        files = sorted(server.folder.glob("host_*.pub"))
        chosen = [key_of(file) for file in files if keys is None or file.stem.removeprefix("host_") in keys]
        return pin(Host(name=name, **described), chosen, laptop.places)

    return trust


@pytest.fixture
def impostor() -> Iterator[Callable[..., int]]:
    """Ports at which something listens that says these bytes to everyone, and then hangs up or holds its tongue."""
    servers: list[socket.socket] = []
    peers: list[socket.socket] = []

    def serve(says: bytes, *, hangs_up: bool = False) -> int:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = server.accept()
                    peers.append(peer)
                    peer.sendall(says)
                    if hangs_up:
                        peer.close()

        threading.Thread(target=accept, daemon=True).start()
        return int(server.getsockname()[1])

    yield serve
    for one in [*servers, *peers]:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()
