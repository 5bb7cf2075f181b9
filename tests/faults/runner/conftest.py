"""Hosts for the faults of the runner: detached, and under a real service manager of a user in its own namespace."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ...agent.conftest import MARK, AgentHost, Refusal, checked, identity_of, wait_for

__all__ = ("MARK", "AgentHost", "Refusal", "checked", "identity_of", "wait_for")

_MANAGER = "/usr/lib/systemd/systemd"
# In a mount namespace of its own: a system that seems booted with systemd, the user's runtime folder, lingering on, and
# a control group whose leader the manager becomes.
_SETUP = """
set -e
mount -t tmpfs tmpfs /run/systemd && mkdir /run/systemd/system
mkdir -p /run/user && mount -t tmpfs tmpfs /run/user && mkdir -m 700 /run/user/0
mkdir -p /var/lib/systemd && mount -t tmpfs tmpfs /var/lib/systemd && mkdir /var/lib/systemd/linger
touch /var/lib/systemd/linger/"$(id -un)"
mkdir "$GROUPS_AT/$GROUP" && echo $$ > "$GROUPS_AT/$GROUP/cgroup.procs"
[ "$GROUPS_AT" = /sys/fs/cgroup ] || mount --bind "$GROUPS_AT" /sys/fs/cgroup
exec "$MANAGER" --user
"""


@dataclass
class Manager:
    """A service manager of this user, and how to get into its namespace."""

    process: subprocess.Popen[bytes]
    group: Path

    @property
    def prefix(self) -> list[str]:
        """What runs a command in the manager's namespace."""
        return ["nsenter", "--target", str(self.process.pid), "--mount", "--"]

    def ask(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run one of systemd's programs beside the manager."""
        env = {**os.environ, "XDG_RUNTIME_DIR": "/run/user/0"}
        return subprocess.run([*self.prefix, *argv], env=env, capture_output=True, text=True, timeout=30, check=False)

    def units(self) -> list[str]:
        """The units of ours that are loaded."""
        listed = self.ask("systemctl", "--user", "list-units", "--all", "--plain", "--no-legend", "lf-*")
        return [line.split()[0] for line in listed.stdout.splitlines() if line.strip()]


def start_manager(folder: Path, name: str) -> Manager | str:
    """A fresh manager, or why there cannot be one here."""
    if os.geteuid() != 0:
        return "a namespace with a service manager takes root"
    if not os.path.exists(_MANAGER) or shutil.which("systemd-run") is None:
        return f"{_MANAGER} or systemd-run is missing"
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    unified = next((fields[1] for fields in mounts if fields[2] == "cgroup2"), None)
    if unified is None or not os.access(unified, os.W_OK):
        return "no control groups of the second version that could be written to"
    env = {"HOME": str(folder), "XDG_RUNTIME_DIR": "/run/user/0", "PATH": os.environ["PATH"]}
    env |= {"GROUPS_AT": unified, "GROUP": name, "MANAGER": _MANAGER}
    with open(folder / "manager.log", "wb") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", _SETUP],
            env=env,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    manager = Manager(process, Path(unified, name))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        if manager.ask("systemctl", "--user", "is-system-running").stdout.strip() in ("running", "degraded"):
            return manager
        time.sleep(0.05)
    stop_manager(manager)
    return "it does not start here: " + (folder / "manager.log").read_text(errors="replace").strip()[-300:]


def stop_manager(manager: Manager) -> None:
    """End the manager with all that it started, and take its control group away."""
    if manager.process.poll() is None:
        manager.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while manager.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    for folder, _, _ in os.walk(manager.group, topdown=False):
        for _ in range(100):
            for pid in Path(folder, "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
            try:
                os.rmdir(folder)
            except OSError:
                manager.process.poll()
                time.sleep(0.02)
            else:
                break
    manager.process.wait(timeout=10)


@pytest.fixture(scope="session")
def shared_manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager | str]:
    """One manager for the tests that do it no harm, or why there is none."""
    started = start_manager(tmp_path_factory.mktemp("manager"), f"lf-test-{os.getpid()}")
    yield started
    if isinstance(started, Manager):
        stop_manager(started)


@pytest.fixture
def manager(shared_manager: Manager | str) -> Iterator[Manager]:
    """The shared manager; at the end no unit of ours may be loaded in it."""
    if isinstance(shared_manager, str):
        pytest.skip(f"no user service manager: {shared_manager}")
    yield shared_manager
    wait_for(lambda: not shared_manager.units(), describe=shared_manager.units)


@pytest.fixture
def own_manager(tmp_path: Path) -> Iterator[Manager]:
    """A manager that the test may stop or maim."""
    (tmp_path / "manager").mkdir()
    started = start_manager(tmp_path / "manager", f"lf-test-{os.getpid()}-own")
    if isinstance(started, str):
        pytest.skip(f"no user service manager: {started}")
    yield started
    stop_manager(started)


def under(manager: Manager, folder: Path) -> Any:
    """A host whose runs are units of that manager."""
    made = AgentHost(folder)
    made.prefix, made.runner = manager.prefix, "systemd"
    return made


@pytest.fixture
def unit_host(manager: Manager, tmp_path: Path) -> Iterator[Any]:
    """A host whose runs are systemd units."""
    yield from checked(under(manager, tmp_path))


@pytest.fixture(params=["detached", "systemd"])
def either_host(request: pytest.FixtureRequest) -> Any:
    """A host, once with each runner: a fault must not find a difference."""
    return request.getfixturevalue("host" if request.param == "detached" else "unit_host")
