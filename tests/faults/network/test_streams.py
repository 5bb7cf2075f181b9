"""Log streams over a line that is cut at random: what the laptop has in the end is what the host has, byte for byte."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dispatch.agent.paths import Root
from dispatch.agent.reserving import reserve
from dispatch.following.follow import Follower
from dispatch.transport.open import open_transport
from dispatch.transport.retry import call
from latentforge.spec.canonical import canonical_bytes

Make = Callable[..., Any]

pytestmark = pytest.mark.sshd

_TALKS = """
import random, sys, time
chance = random.Random(int(sys.argv[1]))
for _ in range(chance.randrange(1, 25)):
    end = chance.choice([b"", b"\\n", b"\\r", b"\\xe2\\x82"])
    sys.stdout.buffer.write(chance.randbytes(chance.randrange(1, 40_000)) + end)
    sys.stdout.buffer.flush()
    time.sleep(chance.random() / 50)
"""


class BadLine:
    """A way to a port on which every connection ends after a random number of bytes, politely or by a reset."""

    def __init__(self, target: tuple[str, int], chance: random.Random) -> None:
        self._target, self._chance = target, chance
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self.cuts = 0
        self._over = False
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._over = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self._server.accept()
                left = self._chance.randrange(5_000, 150_000)
                threading.Thread(
                    target=self._carry, args=(peer, left, self._chance.random() < 0.5), daemon=True
                ).start()

    def _carry(self, peer: socket.socket, left: int, abruptly: bool) -> None:
        other = socket.create_connection(self._target)
        ways = {peer: other, other: peer}
        try:
            while left > 0 and not self._over:
                for one in select.select([peer, other], [], [], 0.2)[0]:
                    data = one.recv(min(left, 8192))
                    if not data:
                        return
                    ways[one].sendall(data)
                    left -= len(data)
            self.cuts += not self._over
            if abruptly:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass
        finally:
            peer.close()
            other.close()


class Nobody:
    """An observer that looks away: what counts is what was kept."""

    def __getattr__(self, name: str) -> Any:
        return lambda *words, **more: None


@dataclass
class Tally:
    """What became of some streams."""

    streams: int = 0
    cuts: int = 0
    bytes: int = 0
    different: int = 0

    def __str__(self) -> str:
        return f"{self.streams} streams, {self.cuts} cuts, {self.bytes} bytes, {self.different} different"


TOGETHER = 125
"""Streams that are followed at the same time, each over a bad line of its own."""
CHAINS = 8
"""Chains of runs that make them, side by side: one run after the other took most of the time."""


def streams(count: int, first: int, server: Any, trusted: Make, reached: Make, laptop: Any, remote: Path) -> Tally:
    """Follow that many random streams over bad lines, and compare what came with what is there."""
    host = trusted(server)
    direct = reached(host)
    direct.install()
    found = Tally()
    for begin in range(first, first + count, TOGETHER):
        seeds = {_reserved(remote, seed): seed for seed in range(begin, min(begin + TOGETHER, first + count))}
        for chain in (list(seeds)[number::CHAINS] for number in range(min(CHAINS, len(seeds)))):
            call(direct, "launch", {"chain": chain})
        with ThreadPoolExecutor(TOGETHER) as pool:
            follow = lambda run, seed: _followed(run, seed, server, host, laptop)  # noqa: E731
            for run, cuts in zip(seeds, pool.map(follow, *zip(*seeds.items(), strict=True)), strict=True):
                there = (remote / "runs" / run / "launch.log").read_bytes()
                here = (laptop.places.followed("box", run) / "launch.log").read_bytes()
                differ = abs(len(here) - len(there)) + sum(a != b for a, b in zip(here, there, strict=False))
                found = Tally(found.streams + 1, found.cuts + cuts, found.bytes + len(there), found.different + differ)
        print(found, flush=True)
    return found


def _reserved(remote: Path, seed: int) -> str:
    identity = canonical_bytes({"kind": "data", "seed": seed}).decode()
    run = f"data-{hashlib.sha256(identity.encode()).hexdigest()[:20]}"
    argv = [sys.executable, "-I", "-S", "-c", _TALKS, str(seed)]
    reserve(Root(str(remote)), run, identity, {"run": run, "kin": "k", "argv": argv, "env": {}, "lease": []})
    return run


def _followed(run: str, seed: int, server: Any, host: Any, laptop: Any) -> int:
    """Follow one run over a bad line to its end; how many times the line was cut."""
    line = BadLine((server.address, server.port), random.Random(seed))
    transport = open_transport(host.model_copy(update={"port": line.port}), laptop.places)
    transport._installed = True  # over the good line, just now
    try:
        assert Follower(transport, laptop.places, Nobody()).follow(run).outcome == "pass", f"seed {seed}"
    finally:
        transport.close()
        line.close()
    return line.cuts


@pytest.mark.fault(row=3)
def test_streams_that_are_cut_at_random_arrive_whole(
    shared_sshd: Any, trusted: Make, reached: Make, laptop: Any, tmp_path: Path
) -> None:
    found = streams(3, 1, shared_sshd, trusted, reached, laptop, tmp_path / "remote")
    assert found.different == 0
    assert found.cuts >= 2, "the lines were not bad enough"


@pytest.mark.soak
@pytest.mark.timeout(7000)
@pytest.mark.fault(row=3)
def test_a_thousand_streams_that_are_cut_at_random_arrive_whole(
    shared_sshd: Any, trusted: Make, reached: Make, laptop: Any, tmp_path: Path
) -> None:
    count = int(os.environ.get("LATENTFORGE_STREAMS", "1000"))
    found = streams(count, 1000, shared_sshd, trusted, reached, laptop, tmp_path / "remote")
    assert found.different == 0
    assert found.cuts >= count / 2
