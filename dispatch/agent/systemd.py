"""The systemd runner: one transient unit of the user's service manager a chain, named by its first run.

The manager refuses a second unit of the same name, keeps the tree in a control group of its own, ends what a dead
supervisor leaves, and then runs `finalize`. The command line carries the agent's path and the run id only; everything
else, the open locks too, is handed over a socket, so that the locks are held without a gap.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import detached
from .durable import write_json
from .paths import RunPaths

OLDEST = 243
"""The first version with Type=exec (240) and OOMPolicy."""
_PLAIN = re.compile(r"[A-Za-z0-9/._+@-]+")  # what neither systemd's quoting nor its $ and % change
_ASK_SECONDS = 10
_PAUSE = 0.1
_STOP_SECONDS = 120
# fmt: off
_PROPERTIES = (
    "Type=exec",              # a unit that could not be executed is an error here, not a unit that failed later
    "KillMode=mixed",         # TERM to the supervisor alone, which ends its job in order; KILL to all that is left
    "OOMPolicy=continue",     # the supervisor lives on to record that the kernel killed its job
    "Restart=no",
    f"TimeoutStopSec={_STOP_SECONDS}",
    "UMask=0077",
    "WorkingDirectory=/",
    "StandardInput=null",
    "StandardOutput=null",
    "StandardError=null",
)
# fmt: on


def runtime_dir() -> str:
    """Where this user's service manager listens, whatever the environment of an SSH session says."""
    return f"/run/user/{os.getuid()}"


def environment() -> dict[str, str]:
    """What systemd's own programs need to find the user's manager."""
    return {"XDG_RUNTIME_DIR": runtime_dir(), "PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def version() -> int | None:
    """The version of systemd; None where there is none."""
    answer = _ask(["systemctl", "--version"])
    found = re.match(r"systemd (\d+)", answer or "")
    return int(found.group(1)) if found else None


def lingers() -> bool | None:
    """Whether the user's manager outlives the last session; None where there is no systemd to say so."""
    import pwd

    if not os.path.isdir("/var/lib/systemd"):
        return None
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return None
    return os.path.exists(os.path.join("/var/lib/systemd/linger", name))


def obstacle(program: str) -> str | None:
    """Why no unit can carry a run on this host; None where one can. Reads only."""
    if not sys.platform.startswith("linux"):
        return "no systemd here"
    folder = runtime_dir()
    try:
        owner = os.stat(folder).st_uid
    except OSError:
        return f"no {folder}: this user has no service manager"
    if owner != os.getuid():
        return f"{folder} belongs to uid {owner}"
    found = version()
    if found is None or shutil.which("systemd-run") is None:
        return "no systemd here"
    if found < OLDEST:
        return f"systemd {found} is older than {OLDEST}"
    state = (_ask(["systemctl", "--user", "is-system-running"], any_status=True) or "").strip()
    if state not in ("running", "degraded"):
        return f"the user's service manager does not answer ({state or 'silent'})"
    if not lingers():
        return "lingering is off: the user's manager would end its units at logout (loginctl enable-linger)"
    for path in (program, sys.executable):
        if not _PLAIN.fullmatch(path):
            return f"{path!r} cannot stand unchanged on a unit's command line"
    return None


def unit_of(run: str) -> str:
    """The unit of the chain that begins with this run; a run id is lower-case letters, digits and a hyphen."""
    return f"lf-{run}.service"


def spawn(first: RunPaths, program: str, chain: list[tuple[str, int]], lease: int | None) -> dict[str, Any]:
    """Start a unit, hand it its orders and the open locks; its first word, or `error` with nothing begun."""
    from .job import passes_to_jobs  # only a launch needs what runs jobs, every probe reads this file

    name = f"lf-{first.id}-{os.urandom(8).hex()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("\0" + name)  # no file that could be left behind; who comes is asked for the uid
        listener.listen(4)
        write_json(first.unit, {"unit": unit_of(first.id), "socket": name})
        error = _run(first.id, program)
        if error is not None:
            return {"error": error}
        with_orders = _accept(listener)
    if with_orders is None:
        _ask(["systemctl", "--user", "stop", unit_of(first.id)])
        return {"error": f"{unit_of(first.id)} did not come for its orders within {detached.PATIENCE:.0f} s"}
    with with_orders as peer:
        orders = {
            "chain": [run for run, _ in chain],
            "lease": lease is not None,
            "environment": {key: value for key, value in os.environ.items() if passes_to_jobs(key)},
        }
        send(peer, orders, [fd for _, fd in chain] + ([] if lease is None else [lease]))
        return detached.hear(peer.fileno())


def send(peer: socket.socket, orders: dict[str, Any], descriptors: list[int]) -> None:
    """Hand over orders together with open descriptors."""
    data = json.dumps(orders).encode()
    socket.send_fds(peer, [struct.pack("<I", len(data))], descriptors)
    peer.sendall(data)


def receive(name: str) -> tuple[dict[str, Any], list[int], socket.socket]:
    """The orders, the descriptors and the connection to answer on; OSError when the launcher is gone."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(detached.PATIENCE)
    peer.connect("\0" + name)
    if _uid_of(peer) not in (os.getuid(), 0):
        raise OSError("the orders come from another user")
    head, descriptors, _, _ = socket.recv_fds(peer, 4, 128)
    if len(head) != 4:
        raise OSError("the launcher ended before it gave its orders")
    left, data = struct.unpack("<I", head)[0], b""
    while len(data) < left:
        chunk = peer.recv(min(1 << 16, left - len(data)))
        if not chunk:
            raise OSError("the launcher ended amid its orders")
        data += chunk
    document: dict[str, Any] = json.loads(data)
    peer.settimeout(None)
    return document, list(descriptors), peer


def _accept(listener: socket.socket) -> socket.socket | None:
    deadline = time.monotonic() + detached.PATIENCE
    while (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            peer, _ = listener.accept()
        except (TimeoutError, socket.timeout):  # noqa: UP041 (Python 3.10 is not 3.11 for nothing)
            return None
        if _uid_of(peer) == os.getuid():
            peer.settimeout(None)
            return peer
        peer.close()
    return None


def _uid_of(peer: socket.socket) -> int:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _run(run: str, program: str) -> str | None:
    """Ask the manager for the unit; why it did not start, or None. A predecessor that is still ending is waited for."""
    python = [sys.executable, "-I", "-S", "-B", program]
    properties = [
        f"--property={line}" for line in (*_PROPERTIES, "ExecStopPost=" + " ".join([*python, "finalize", run]))
    ]
    unit = ["systemd-run", "--user", "--quiet", "--collect", f"--unit={unit_of(run)}", *properties]
    deadline = time.monotonic() + detached.PATIENCE
    while True:
        try:
            done = subprocess.run(
                [*unit, "--", *python, "unit", run],
                env=environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=detached.PATIENCE,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"systemd-run: {error}"
        said = done.stderr.decode("utf-8", "replace").strip()
        if done.returncode == 0:
            return None
        # We hold the run's lock, so whatever bears its name is on its way out.
        if "already" not in said or time.monotonic() > deadline:
            return f"systemd-run: {said[-500:] or f'status {done.returncode}'}"
        time.sleep(_PAUSE)


def _ask(argv: list[str], *, any_status: bool = False) -> str | None:
    try:
        done = subprocess.run(
            argv,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_ASK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 or any_status else None


def control_group() -> str | None:
    """The folder of the control group that this process is in; None where there is no unified hierarchy."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="replace") as groups:
            path = next(line.rstrip("\n")[3:] for line in groups if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    folder = Path("/sys/fs/cgroup", path.lstrip("/"))
    return str(folder) if (folder / "cgroup.procs").is_file() else None


def members(folder: str) -> set[int]:
    """The pids in a control group and those below it; empty when it is gone."""
    found: set[int] = set()
    for parent, _, names in os.walk(folder):
        if "cgroup.procs" in names:
            try:
                with open(os.path.join(parent, "cgroup.procs"), encoding="ascii") as file:
                    found |= {int(line) for line in file}
            except (OSError, ValueError):
                continue
    return found
