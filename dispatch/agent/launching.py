"""Launch: claim every unfinished run of a chain, take the device, and hand all of it to one detached supervisor."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from typing import Any

from . import journal, locks
from .cas import Origin, install
from .durable import read_json
from .paths import Root, RunPaths
from .processes import boot_id, is_alive
from .protocol import BUSY, UNKNOWN, AgentError
from .reserving import never_started, remove
from .state import derive

LONGEST_CHAIN = 64
# How long to wait for the owner of a lock to say who it is, and for a new supervisor to start its first run.
_PATIENCE = 15.0
_PAUSE = 0.02
_SPACE_FLOOR = 16 << 20


def launch(root: Root, chain: list[str], wait_lease: bool, origin: Origin) -> dict[str, Any]:
    """Start the reserved runs of `chain` in order under one supervisor, unless that has happened already.

    Finished passes are skipped. A run that ended otherwise blocks: reservations behind it that never started go.
    """
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
        return _start(root, runs, todo, claimed, wait_lease, origin)
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
    root: Root, runs: list[RunPaths], todo: list[RunPaths], claimed: dict[str, int], wait_lease: bool, origin: Origin
) -> dict[str, Any]:
    if not sys.platform.startswith("linux"):
        raise AgentError("refused", f"this host runs {sys.platform}; runs can be launched on Linux only")
    space = os.statvfs(root.dir)
    if space.f_bavail * space.f_frsize < _SPACE_FLOOR:
        raise AgentError(
            "disk-full", f"{root.dir} has {space.f_bavail * space.f_frsize >> 20} MiB free, a run needs 16"
        )
    program = install(root, origin)
    lease = None
    if any(wants_device(run) for run in todo):
        lease = locks.take(root.device_lock)
        if lease is None and not wait_lease:
            _refuse_device(root)
    try:
        ready = _spawn(root, str(program), todo, claimed, lease)
    finally:
        if lease is not None:
            locks.release(lease)
    if "error" in ready:
        raise AgentError("internal", f"the supervisor did not start: {ready['error']}", code=UNKNOWN)
    return _answer(runs, started=True, pid=ready.get("pid"))


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


def _spawn(
    root: Root, program: str, todo: list[RunPaths], claimed: dict[str, int], lease: int | None
) -> dict[str, Any]:
    """Fork twice into a new session and execute the installed agent there, with the locks open; wait for its word."""
    config = {"root": str(root.dir), "chain": [[run.id, claimed[run.id]] for run in todo], "lease": lease}
    config_read, config_write = os.pipe()
    os.write(config_write, json.dumps(config).encode())
    os.close(config_write)
    ready_read, ready_write = os.pipe()
    keep = sorted([*claimed.values(), *([] if lease is None else [lease])])
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                _become_supervisor(program, todo[0].id, config_read, ready_write, keep)
        finally:
            os._exit(0)
    os.close(config_read)
    os.close(ready_write)
    os.waitpid(child, 0)
    try:
        return _hear(ready_read)
    finally:
        os.close(ready_read)


def _become_supervisor(program: str, first: str, config_read: int, ready_write: int, keep: list[int]) -> None:
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(config_read, 0)
        os.dup2(null, 1)
        os.dup2(ready_write, 2)
        # A descriptor of the SSH session left open here would keep that session from ending.
        position = 3
        for fd in keep:
            os.closerange(position, fd)
            os.set_inheritable(fd, True)
            position = fd + 1
        os.closerange(position, os.sysconf("SC_OPEN_MAX"))
        os.chdir("/")
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-B", program, "supervise", first])
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(1)


def _hear(ready_read: int) -> dict[str, Any]:
    deadline = time.monotonic() + _PATIENCE
    heard = b""
    poll = select.poll()
    poll.register(ready_read, select.POLLIN | select.POLLHUP)
    while (left := deadline - time.monotonic()) > 0 and not heard.endswith(b"\n\0"):
        if poll.poll(left * 1000):
            chunk = os.read(ready_read, 65536)
            if not chunk:
                break
            heard += chunk
    if heard.endswith(b"\n\0"):
        document: dict[str, Any] = json.loads(heard[: heard.rindex(b"\n\0")].rpartition(b"\n")[2])
        return document
    if left <= 0:
        return {}  # slow, not dead: the states in the reply say how far it is
    return {"error": heard.decode("utf-8", "replace")[-2000:] or "it ended without a word"}
