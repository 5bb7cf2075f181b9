"""Launch: claim every unfinished run of a chain, take the device, and hand all of it to one detached supervisor."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from . import detached, journal, locks, pulling, runner, systemd
from .cas import Origin, install
from .durable import read_json
from .paths import Root, RunPaths
from .processes import boot_id, is_alive
from .protocol import BUSY, UNKNOWN, AgentError
from .reserving import never_started, remove
from .state import derive

LONGEST_CHAIN = 64
# How long to wait for the owner of a lock to say who it is: as long as it may take to hand the lock over.
_PATIENCE = 3 * detached.PATIENCE
_PAUSE = 0.02
_SPACE_FLOOR = 16 << 20


def launch(
    root: Root, chain: list[str], wait_lease: bool, origin: Origin, wanted_runner: str = "detached"
) -> dict[str, Any]:
    """Start the reserved runs of `chain` in order under one supervisor, unless that has happened already.

    Finished passes are skipped. A run that ended otherwise blocks: reservations behind it that never started go.
    """
    runner.check(wanted_runner)
    runs = _distinct(root, chain)
    deadline = time.monotonic() + _PATIENCE
    while True:
        states = {run.id: derive(run) for run in runs}
        for run in runs:
            if states[run.id]["state"] == "absent":
                raise AgentError(
                    "refused", f"{run.id} is not reserved on this host", next="reserve it, then launch again"
                )
        blocker = next((run for run in runs if _ended_badly(states[run.id])), None)
        if blocker is not None:
            removed = _remove_after(runs, blocker)
            return _answer(runs, blocked=blocker.id, removed=removed)
        todo = [run for run in runs if states[run.id]["state"] != "finished"]
        if not todo or any(states[run.id]["state"] == "unsupervised" for run in todo):
            return _answer(runs)
        claimed = _claim(todo)
        if claimed is not None:
            break
        owner = _owner(todo)
        if owner is not None and {run.id for run in todo} <= set(owner.get("chain", [])):
            return _answer(runs)
        if owner is not None or time.monotonic() > deadline:
            _refuse_foreign(todo, owner)
        time.sleep(_PAUSE)
    try:
        return _start(root, runs, todo, claimed, wait_lease, origin, wanted_runner)
    finally:
        for fd in claimed.values():
            locks.release(fd)


def wants_device(run: RunPaths) -> bool:
    """Whether the run's launch description asks for the device lease."""
    return "device" in (read_json(run.launch) or {}).get("lease", [])


def _distinct(root: Root, chain: list[str]) -> list[RunPaths]:
    if not chain or len(chain) > LONGEST_CHAIN:
        raise AgentError("refused", f"chain of {len(chain)} runs: 1 to {LONGEST_CHAIN} can be launched")
    if len(set(chain)) != len(chain):
        raise AgentError("refused", f"chain={chain!r} names a run twice")
    return [root.run(run) for run in chain]


def _ended_badly(state: dict[str, Any]) -> bool:
    return state["state"] in ("lost", "interrupted") or (
        state["state"] in ("finished", "finishing") and state["outcome"] != "pass"
    )


def _claim(todo: list[RunPaths]) -> dict[str, int] | None:
    """All locks of the unfinished runs, or none: whoever has the first decides about the whole chain."""
    claimed: dict[str, int] = {}
    for run in todo:
        try:
            fd = locks.take(run.lock)
        except FileNotFoundError:
            fd = None
        if fd is None or not never_started(run):
            for other in [*claimed.values(), *([] if fd is None else [fd])]:
                locks.release(other)
            return None
        claimed[run.id] = fd
    return claimed


def _owner(todo: list[RunPaths]) -> dict[str, Any] | None:
    for run in todo:
        supervisor = read_json(run.supervisor)
        if (
            supervisor is not None
            and locks.held(run.lock)
            and supervisor.get("boot_id") == boot_id()
            and is_alive(supervisor.get("pid"), supervisor.get("ticks"))
        ):
            return {**supervisor, "run": run.id}
    return None


def _refuse_foreign(todo: list[RunPaths], owner: dict[str, Any] | None) -> None:
    if owner is None:
        raise AgentError(
            "busy",
            f"{todo[0].id} is locked by a process that does not say who it is",
            next="ask for the run's status, then launch again",
            code=BUSY,
        )
    raise AgentError(
        "busy",
        f"{owner['run']} belongs to another chain (supervisor pid {owner['pid']}, since {_when(owner.get('since'))})",
        next=f"wait until {owner['run']} has ended, then launch again",
        code=BUSY,
        detail={"holder": owner},
    )


def _remove_after(runs: list[RunPaths], blocker: RunPaths) -> list[str]:
    removed = []
    for run in reversed(runs[runs.index(blocker) + 1 :]):
        try:
            fd = locks.take(run.lock)
        except FileNotFoundError:
            continue
        if fd is None:
            continue
        try:
            if never_started(run):
                journal.record(blocker, "reservation-removed", removed=run.id)
                remove(run)
                removed.append(run.id)
        finally:
            locks.release(fd)
    return removed


def _answer(
    runs: list[RunPaths],
    *,
    started: bool = False,
    pid: int | None = None,
    blocked: str | None = None,
    removed: list[str] | None = None,
) -> dict[str, Any]:
    return {
        "started": started,
        "supervisor_pid": pid,
        "blocked": blocked,
        "removed": removed or [],
        "states": {run.id: derive(run) for run in runs},
    }


def _start(
    root: Root,
    runs: list[RunPaths],
    todo: list[RunPaths],
    claimed: dict[str, int],
    wait_lease: bool,
    origin: Origin,
    wanted_runner: str,
) -> dict[str, Any]:
    if not sys.platform.startswith("linux"):
        raise AgentError("refused", f"this host runs {sys.platform}; runs can be launched on Linux only")
    space = os.statvfs(root.dir)
    if space.f_bavail * space.f_frsize < _SPACE_FLOOR:
        raise AgentError(
            "disk-full", f"{root.dir} has {space.f_bavail * space.f_frsize >> 20} MiB free, a run needs 16"
        )
    guard = locks.wait_for(root.reserve_lock, 30.0)  # while this is held, nothing that a run needs is removed
    if guard is None:
        raise AgentError("busy", "a clean-up has been going on for 30 s", next="launch again", code=BUSY)
    try:
        pulling.check_inputs(root, todo)
        ready = _spawned(root, todo, claimed, wait_lease, str(install(root, origin)), wanted_runner)
    finally:
        locks.release(guard)
    if "error" in ready:
        raise AgentError("internal", f"the supervisor did not start: {ready['error']}", code=UNKNOWN)
    return _answer(runs, started=True, pid=ready.get("pid"))


def _spawned(
    root: Root, todo: list[RunPaths], claimed: dict[str, int], wait_lease: bool, program: str, wanted_runner: str
) -> dict[str, Any]:
    """Hand the locks, and the lease where it is wanted, to a supervisor; its first word."""
    chosen = runner.choose(wanted_runner, program)
    lease = None
    if any(wants_device(run) for run in todo):
        lease = locks.take(root.device_lock)
        if lease is None and not wait_lease:
            _refuse_device(root)
    with_locks = [(run.id, claimed[run.id]) for run in todo]
    try:
        if chosen == "systemd":
            return systemd.spawn(todo[0], program, with_locks, lease)
        return detached.spawn(str(root.dir), program, with_locks, lease)
    finally:
        if lease is not None:
            locks.release(lease)


def _refuse_device(root: Root) -> None:
    holder = locks.holder(root.device_lock) or {}
    raise AgentError(
        "busy",
        f"the device is leased to {holder.get('run', 'an unknown run')} "
        f"(pid {holder.get('pid', 'unknown')}, since {_when(holder.get('since'))})",
        next=f"wait for {holder.get('run', 'it')}, cancel it, or launch with wait_lease",
        code=BUSY,
        detail={"holder": holder},
    )


def _when(wall: object) -> str:
    if not isinstance(wall, (int, float)):
        return "unknown"
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(wall))
