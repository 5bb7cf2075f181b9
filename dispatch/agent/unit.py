"""What runs inside a systemd unit: the supervisor that gets its orders over a socket, and `finalize` after it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from . import exitrec, journal, memory_evidence, systemd
from .durable import read_json
from .ending import write_for_the_dead
from .paths import Root, RunPaths
from .processes import SUPERVISOR, boot_id, call_myself
from .supervisor import Chain, ignore, work

_STOPPED = "the user's service manager stopped it (its unit, a logout without lingering, or the host's shutdown)"


def serve_unit(program: str, first: str) -> None:
    """Entry of the supervisor inside a unit; without a launcher that waits for it, it ends and nothing has begun."""
    call_myself(SUPERVISOR)
    ignore(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE)
    root = _root_of(program)
    unit = read_json(root.run(first).unit)
    if unit is None:
        sys.exit(f"{first} has no unit.json")
    try:
        orders, descriptors, peer = systemd.receive(unit["socket"])
    except OSError as error:
        sys.exit(f"{first}: {error}")
    os.environ.update(orders["environment"])
    locks, lease = descriptors[: len(orders["chain"])], None
    if orders["lease"]:
        lease = descriptors[len(orders["chain"])]
    identity: dict[str, Any] = {
        "runner": "systemd",
        "unit": unit["unit"],
        "invocation": os.environ.get("INVOCATION_ID"),
        "cgroup": systemd.control_group(),
        "oom_kills": memory_evidence.counters().group,
    }
    runs = [(root.run(run), lock) for run, lock in zip(orders["chain"], locks, strict=True)]
    chain = Chain(root, runs, lease, peer.detach(), identity=identity)

    def stop(number: int, frame: object) -> None:
        chain.stopping = _STOPPED

    signal.signal(signal.SIGTERM, stop)
    work(chain)


def finalize(program: str, first: str) -> None:
    """After a unit has ended, by whatever cause: record the end of a run whose supervisor could not.

    The manager has killed the whole tree by now, and says in the environment how the supervisor ended.
    """
    root = _root_of(program)
    supervisor = read_json(root.run(first).supervisor) or {}
    for name in supervisor.get("chain", [first]):
        run = root.run(name)
        if _is_unrecorded(run):
            kind, reason = _judge(supervisor)
            if write_for_the_dead(run, "killed", kind, reason, runner="systemd"):
                journal.record(run, "finalized", reason=reason, **{"class": kind})


def _is_unrecorded(run: RunPaths) -> bool:
    started = journal.read(run).started
    return started is not None and started.get("boot_id") == boot_id() and exitrec.read(run.exit) is None


def _judge(supervisor: dict[str, Any]) -> tuple[str, str]:
    result, code = os.environ.get("SERVICE_RESULT", "unknown"), os.environ.get("EXIT_CODE", "unknown")
    status = os.environ.get("EXIT_STATUS", "unknown")
    how = f"with status {status}" if code == "exited" else f"by signal {status}"
    told = f"its supervisor ended {how} ({result}), and the service manager ended the rest"
    before, after = supervisor.get("oom_kills"), memory_evidence.counters().group
    if isinstance(before, int) and after is not None and after > before:
        return "oom", f"out of memory: cgroup oom_kill +{after - before}; {told}"
    return ("signal" if status == "TERM" or result == "timeout" else "killed-unknown"), told


def _root_of(program: str) -> Root:
    """The state root that holds the agent: it lies in <root>/agent/<sha256>.pyz."""
    return Root(str(Path(program).resolve().parents[1]))
