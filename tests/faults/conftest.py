"""The fault harness: hosts behind a wire that can be cut, servers with logins of their own, and a look at what is left.

The fixtures of tests/dispatch (laptop, sshd_at, enrolled, jobs, ask, session, built, …) and of tests/agent (host,
small_disk, …) are here too.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from _pytest.fixtures import FixtureFunctionDefinition

from ..agent import conftest as _agent
from ..dispatch import conftest as _dispatch

_TEMPORARY = re.compile(r"\.tmp-|\.reserving-|\.removing-|secrets\.env\.json$|.*\.new$|\..*\.[a-z0-9_]{8}$")
_count = itertools.count()


for _module in (_agent, _dispatch):
    globals().update({key: one for key, one in vars(_module).items() if isinstance(one, FixtureFunctionDefinition)})


# --- what a test may not leave behind --------------------------------------------------------------------------------


def strays(folder: Path) -> dict[int, str]:
    """Living processes that have to do with a folder: by command, current folder, open files or environment."""
    mark, found = str(folder).encode(), {}
    mine = {os.getpid(), os.getppid()}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        if pid in mine:
            continue
        base = Path("/proc", str(pid))
        with contextlib.suppress(OSError):
            command = (base / "cmdline").read_bytes()
            if (base / "stat").read_text().rpartition(")")[2].split()[0] in "ZX" or not command:
                continue
            links = [base / "cwd", *(base / "fd").iterdir()]
            seen = [command, *(os.fsencode(os.readlink(link)) for link in links if os.path.islink(link))]
            if mark in (base / "environ").read_bytes() or any(mark in one for one in seen):
                found[pid] = command.replace(b"\0", b" ").decode("utf-8", "replace").strip()
    return found


def temporaries(folder: Path) -> list[str]:
    """Files below a folder that only a write under way, or a run that goes on, may have."""
    return [str(path) for path in folder.rglob("*") if _TEMPORARY.match(path.name)]


def held_locks(folder: Path) -> list[str]:
    """Locks and leases below a folder that somebody holds."""
    held = []
    for path in folder.rglob("*"):
        if (path.name == "lock" or path.suffix == ".lock") and path.is_file() and not path.is_symlink():
            with open(path, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    held.append(str(path))
    return held


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Every fault test ends with no stray process, no held lease or lock, and no temporary file below its folder."""
    yield
    deadline = time.monotonic() + 10
    while (left := strays(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, f"stray processes: {left}"
    assert not (held := held_locks(tmp_path)), f"locks that are still held: {held}"
    assert not (files := temporaries(tmp_path)), f"temporary files: {files}"


# --- a network of one's own ------------------------------------------------------------------------------------------


@dataclass
class Wire:
    """A veth pair between this machine and a network namespace: a host's only connection with its laptop."""

    namespace: str
    here: str
    there: str
    laptop: str
    host: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """The command that starts a program at the far end."""
        return ("nsenter", f"--net=/run/netns/{self.namespace}")

    def cut(self) -> None:
        """Nothing passes any more, in either direction, and neither end is told."""
        self._far("ip", "link", "set", self.there, "down")

    def restore(self) -> None:
        """The wire is whole again."""
        self._far("ip", "link", "set", self.there, "up")
        self._far("ip", "neigh", "replace", self.laptop, "lladdr", _hardware(self.here), "dev", self.there)

    def deafen(self) -> None:
        """What the laptop sends still arrives; nothing that the host sends does, not even that it has arrived."""
        self._far("ip", "route", "add", "blackhole", f"{self.laptop}/32")

    def hear(self) -> None:
        """Undo `deafen`."""
        self._far("ip", "route", "del", "blackhole", f"{self.laptop}/32")

    def slow(self, kilobits: int) -> None:
        """So many kilobits a second in each direction."""
        rate = ("root", "tbf", "rate", f"{kilobits}kbit", "burst", "4kb", "latency", "500ms")
        _run("tc", "qdisc", "replace", "dev", self.here, *rate)
        self._far("tc", "qdisc", "replace", "dev", self.there, *rate)

    def fast(self) -> None:
        """No limit any more."""
        _run("tc", "qdisc", "del", "dev", self.here, "root")
        self._far("tc", "qdisc", "del", "dev", self.there, "root")

    def _far(self, *words: str) -> None:
        _run(*self.prefix, *words)

    def lay(self) -> None:
        """Make the namespace and the pair."""
        _run("ip", "netns", "add", self.namespace)
        _run("ip", "link", "add", self.here, "type", "veth", "peer", "name", self.there, "netns", self.namespace)
        _run("ip", "addr", "add", f"{self.laptop}/30", "dev", self.here)
        _run("ip", "link", "set", self.here, "up")
        self._far("ip", "addr", "add", f"{self.host}/30", "dev", self.there)
        self._far("ip", "link", "set", self.there, "up")
        self._far("ip", "link", "set", "lo", "up")
        # Neighbours that never expire: else a cut soon turns into "no route", which is a kinder fault than silence.
        _run("ip", "neigh", "replace", self.host, "lladdr", self._hardware_far(), "dev", self.here)
        self._far("ip", "neigh", "replace", self.laptop, "lladdr", _hardware(self.here), "dev", self.there)

    def _hardware_far(self) -> str:
        shown = subprocess.run(
            [*self.prefix, "ip", "-o", "link", "show", self.there], capture_output=True, text=True, check=True
        )
        return shown.stdout.split("link/ether ")[1].split()[0]

    def remove(self) -> None:
        """Take everything away again, whatever of it there is."""
        for words in (("ip", "link", "del", self.here), ("ip", "netns", "del", self.namespace)):
            subprocess.run(words, capture_output=True, check=False)


def _hardware(device: str) -> str:
    return Path(f"/sys/class/net/{device}/address").read_text().strip()


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip()}"


def _no_namespaces() -> str | None:
    if sys.platform != "linux" or os.geteuid() != 0 or not all(map(shutil.which, ("ip", "nsenter"))):
        return "it takes root, ip and nsenter"
    trial = Wire(f"lf{os.getpid()}-try", f"lf{os.getpid() % 0xFFFFFF:x}ta", "lftry", "198.18.255.249", "198.18.255.250")
    try:
        trial.lay()
    except (AssertionError, OSError, IndexError) as error:
        return str(error)
    finally:
        trial.remove()
    return None


@pytest.fixture(scope="session")
def can_wire() -> None:
    """Skips where network namespaces cannot be made, with the reason."""
    if reason := _no_namespaces():
        pytest.skip(f"no network namespaces on this machine: {reason}")


@pytest.fixture
def wire(can_wire: None) -> Iterator[Callable[[], Wire]]:
    """Lays wires to hosts of their own network; they are taken away at the end."""
    laid: list[Wire] = []

    def lay() -> Wire:
        for _ in range(50):
            number = next(_count)
            net = f"198.{random.choice((18, 19))}.{random.randrange(255)}"
            base = 4 * random.randrange(62)
            tag = f"lf{os.getpid() % 0xFFFFFF:x}{number:x}"
            one = Wire(f"{tag}-net", f"{tag}a", f"{tag}b", f"{net}.{base + 1}", f"{net}.{base + 2}")
            used = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True, check=True).stdout
            if f" {net}." not in used:  # another session of these tests may be under way
                laid.append(one)
                one.lay()
                return one
        raise AssertionError("no free network was found")

    yield lay
    for one in laid:
        one.remove()


# --- servers of one's own --------------------------------------------------------------------------------------------


def login_as(folder: Path, shell: str, home: Path) -> tuple[str, ...]:
    """What starts a server in which this user has another login shell and home: a passwd file of its own, bound over
    the machine's in a mount namespace that goes with the server."""
    import pwd

    me = pwd.getpwuid(os.geteuid())
    lines = Path("/etc/passwd").read_text().splitlines()
    mine = f"{me.pw_name}:x:{me.pw_uid}:{me.pw_gid}::{home}:{shell}"
    passwd = folder / "passwd"
    passwd.write_text("\n".join(mine if line.startswith(f"{me.pw_name}:") else line for line in lines) + "\n")
    script = 'mount --bind "$0" /etc/passwd && exec "$@"'
    return ("unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(passwd))


@pytest.fixture
def sshd_here(tmp_path: Path, sshd_at: Callable[[], Any]) -> Iterator[Callable[..., Any]]:
    """Makes servers that belong to one test: at an end of a wire, with options, with a login shell of their own.

    ``sshd_here(wire=…, address=…, options="MaxSessions 2", shell="/bin/tcsh", home=…)``; not started with start=False.
    """
    made: list[Any] = []

    def make(
        *,
        wire: Wire | None = None,
        address: str = "127.0.0.1",
        options: str = "",
        shell: str | None = None,
        home: Path | None = None,
        start: bool = True,
    ) -> Any:
        folder = tmp_path / f"sshd{len(made)}"
        folder.mkdir()
        server = _dispatch.Sshd(folder, _dispatch.free_port(), address=address, options=options)
        if wire is not None:
            server.address, server.port, server.prefix = wire.host, 22, wire.prefix
        if shell is not None or home is not None:
            home = home or server.home
            home.mkdir(exist_ok=True)
            server.env["HOME"] = str(home)
            server.prefix = (*server.prefix, *login_as(folder, shell or "/bin/bash", home))
        made.append(server)
        server.prepare()
        if start:
            server.start()
        return server

    yield make
    for server in made:
        server.stop()
