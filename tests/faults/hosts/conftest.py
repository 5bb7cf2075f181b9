"""Two hosts of their own networks, with a cable between them beside the one to the laptop."""

from __future__ import annotations

import getpass
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dispatch.hosts.inventory import Host, Inventory

LINK = ("198.51.100.1", "198.51.100.2")
"""The addresses on the cable: in namespaces that nothing else can reach, so no two sessions meet."""
DEADLINE = 6.0


@dataclass
class TwoHosts:
    """Hosts ``a`` and ``b``: each a server in a network namespace, linked by ``cable-a`` and ``cable-b``."""

    wires: list[Any]
    servers: list[Any]
    roots: list[Path]
    hosts: list[Host]

    def cut_cable(self) -> None:
        """The hosts do not reach each other any more; the laptop reaches both."""
        self._far(1, "ip", "link", "set", "cable-b", "down")

    def cut(self, number: int) -> None:
        """Nothing reaches a host any more, by either way, and nobody is told."""
        self._far(number, "ip", "link", "set", f"cable-{'ab'[number]}", "down")
        self.wires[number].cut()

    def restore(self, number: int) -> None:
        """The host is back on both networks."""
        self._far(number, "ip", "link", "set", f"cable-{'ab'[number]}", "up")
        self.wires[number].restore()

    def slow(self, megabits: int) -> None:
        """So many megabits a second on the cable."""
        rate = ("root", "tbf", "rate", f"{megabits}mbit", "burst", "32kb", "latency", "500ms")
        for number, name in enumerate("ab"):
            self._far(number, "tc", "qdisc", "replace", "dev", f"cable-{name}", *rate)

    def die(self, number: int) -> int:
        """A host loses its power: nobody hears from it again, and none of its processes is left; how many went."""
        self.cut(number)
        gone = 0
        for _ in range(10):  # what is forked meanwhile goes in the next round
            listed = subprocess.run(
                ["ip", "netns", "pids", self.wires[number].namespace], capture_output=True, text=True, check=True
            )
            if not (pids := listed.stdout.split()):
                break
            gone += len(pids)
            for pid in pids:
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    gone -= 1
        self.servers[number].process.wait(10)
        return gone

    def boot(self, number: int) -> None:
        """The host is up again: its networks, its server; none of its processes. The cable is as fast as it was."""
        for one, name in enumerate("ab"):
            self._far(one, "tc", "qdisc", "del", "dev", f"cable-{name}", "root")
        self.restore(number)
        self.servers[number].start()

    def _far(self, number: int, *words: str) -> None:
        subprocess.run([*self.wires[number].prefix, *words], check=True, capture_output=True)


@pytest.fixture
def two_hosts(
    wire: Callable[[], Any], sshd_at: Any, sshd_here: Callable[..., Any], laptop: Any, tmp_path: Path
) -> TwoHosts:
    """Two enrolled hosts with a cable between them."""
    wires = [wire(), wire()]
    made = TwoHosts(wires, [sshd_here(wire=one) for one in wires], [tmp_path / "root-a", tmp_path / "root-b"], [])
    ends = ["type", "veth", "peer", "name", "cable-b", "netns", wires[1].namespace]
    subprocess.run(["ip", "link", "add", "cable-a", "netns", wires[0].namespace, *ends], check=True)
    for number, name in enumerate("ab"):
        made._far(number, "ip", "addr", "add", f"{LINK[number]}/30", "dev", f"cable-{name}")
        made._far(number, "ip", "link", "set", f"cable-{name}", "up")
        server = made.servers[number]
        words = ["enrol", name, "--address", server.address, "--port", str(server.port), "--user", getpass.getuser()]
        words += ["--identity", str(server.key), "--root", str(made.roots[number]), "--python", sys.executable]
        done = laptop.cli(*words, "--link", f"cable-{name}", "--yes")
        assert done.returncode == 0, done.stderr
    file = laptop.places.hosts_file
    file.write_text(file.read_text().replace('link = "', f'link_deadline = {DEADLINE}\nlink = "'))
    inventory = Inventory.load(laptop.places)
    made.hosts = [inventory.get(name) for name in "ab"]
    return made
