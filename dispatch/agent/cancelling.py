"""Cancel: ask the whole tree to end, then make it, then look whether it is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

from . import journal, locks, systemd
from .durable import read_json, write_json
from .ending import write_for_the_dead
from .paths import RunPaths
from .processes import (
    AGENT,
    MARK,
    SUPERVISOR,
    Process,
    boot_clock,
    boot_id,
    descendants,
    is_alive,
    look,
    name_of,
    send,
    table,
)
from .protocol import AgentError
from .reserving import never_started, remove
from .state import derive

_PAUSE = 0.02
_PATIENCE = 10.0
GRACE = 10.0
LONGEST_GRACE = 600.0
_ACTIVE = ("running", "unsupervised")


def grace_of(run: RunPaths) -> float:
    """The seconds between TERM and KILL that a run was promised, in its launch description; 10 where in none."""
    promised = (read_json(run.launch) or {}).get("endurance", {}).get("stop_grace", GRACE)
    return min(LONGEST_GRACE, float(promised))


def cancel(run: RunPaths, grace: float, by: str | None) -> dict[str, Any]:
    """TERM, `grace` seconds, KILL for every process of the run; a waiting run leaves its chain; repeating is harmless.

    The answer: `did` ("nothing", "removed", "ended"), the state afterwards, `grace_used` seconds and `survivors`.
    """
    before = derive(run)
    intent = {"by": (by or "unknown")[:100], "wall": time.time(), "grace": grace}
    if before["state"] == "reserved" and _remove(run):
        return _answer(run, "removed")
    if before["state"] in ("finished", "lost") and _members(run):
        return _end(run, grace, intent, before["state"])  # its end is known; something of it lives on all the same
    if before["state"] in ("absent", "reserved", "finished", "lost", "interrupted"):
        return _answer(run, "nothing")
    if not run.cancel.is_file():
        _ask(run, intent)
    _wake_supervisor(run)
    before = _settle(run)
    if before["state"] == "absent":
        return _answer(run, "removed")
    if before["state"] not in (*_ACTIVE, "finishing"):
        return _answer(run, "nothing" if before["outcome"] != "cancelled" else "ended")
    return _end(run, grace, intent, before["state"])


def _ask(run: RunPaths, intent: dict[str, Any]) -> None:
    """Leave the request where its supervisor looks; a waiting run may be dropped, and gone, before we note it."""
    try:
        write_json(run.cancel, intent)
        journal.record(run, "cancel-requested", **intent)
    except FileNotFoundError:
        if run.identity.is_file():
            raise


def _wake_supervisor(run: RunPaths) -> None:
    """A supervisor that somebody stopped can neither drop a waiting run nor record an end."""
    supervisor = read_json(run.supervisor) or {}
    if supervisor.get("boot_id") == boot_id() and is_alive(supervisor.get("pid"), supervisor.get("ticks")):
        guardian = look(supervisor["pid"])
        if guardian is not None and guardian.state in "Tt":
            send(guardian, signal.SIGCONT)


def _settle(run: RunPaths) -> dict[str, Any]:
    """Wait until a queued run is dropped by its supervisor, and until a starting or finishing one is past that."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        state = derive(run)
        if state["state"] == "reserved" and _remove(run):
            continue
        if state["state"] not in ("queued", "starting", "finishing") or time.monotonic() > deadline:
            return state
        time.sleep(_PAUSE)


def _remove(run: RunPaths) -> bool:
    lock = locks.take(run.lock)
    if lock is None:
        return False
    try:
        if not never_started(run):
            return False
        remove(run)
        return True
    finally:
        locks.release(lock)


def _end(run: RunPaths, grace: float, intent: dict[str, Any], found: str) -> dict[str, Any]:
    begun = boot_clock()
    asked: set[tuple[int, int]] = set()
    forced = False
    while True:
        members = _members(run)
        late = boot_clock() - begun >= grace
        for process in members:
            if late:
                forced = True
                send(process, signal.SIGKILL)
            elif (process.pid, process.ticks) not in asked:
                asked.add((process.pid, process.ticks))
                send(process, signal.SIGTERM)
                send(process, signal.SIGCONT)  # a stopped process would sleep through its grace
        state = derive(run)
        if not members and state["state"] not in (*_ACTIVE, "finishing") and not _holds_the_device(run):
            break
        if boot_clock() - begun > grace + _PATIENCE:
            break
        time.sleep(_PAUSE)
    if state["state"] == "lost" and found in _ACTIVE:
        # Nobody saw how the job ended, since its supervisor was gone; that it was cancelled is known, and is written.
        reason = "its supervisor was gone, so nobody saw its exit status"
        write_for_the_dead(run, "cancelled", "cancelled", reason, cancel=intent)
    survivors = [process.pid for process in _members(run)]
    used = boot_clock() - begun
    with contextlib.suppress(OSError):  # a full disk must not keep a cancel from answering
        journal.record(run, "cancelled", grace_used=used, forced=forced, survivors=survivors)
    return _answer(run, "ended", used=used, forced=forced, survivors=survivors)


def _holds_the_device(run: RunPaths) -> bool:
    """Whether its supervisor has yet to give the lease back: who was told that it is cancelled may launch the next."""
    holder = locks.holder(run.dir.parent.parent / "locks" / "device.lock")
    return holder is not None and holder.get("run") == run.id


def _members(run: RunPaths) -> list[Process]:
    """The living processes of the run: its leader's session and offspring, its supervisor's, holders of its lock, and
    where no supervisor has adopted what the job orphaned, all that carry the mark of its start."""
    past = journal.read(run).started
    if past is None or past.get("boot_id") != boot_id():
        return []
    processes = table()
    leader, born = past["pid"], past["ticks"]
    found: set[int] = set()
    known = processes.get(leader)
    if known is not None and known.ticks == born:
        found |= {leader, *descendants(leader, processes)}
        found |= {process.pid for process in processes.values() if process.session == leader}
    supervisor = read_json(run.supervisor) or {}
    guardian = look(supervisor["pid"]) if isinstance(supervisor.get("pid"), int) else None
    supervised = guardian is not None and guardian.ticks == supervisor.get("ticks")
    found |= _lock_holders(run)
    if supervised and guardian is not None and derive(run)["state"] == "running":
        # Its supervisor adopts what the job orphans, and has only this one job at a time.
        found |= descendants(guardian.pid, processes)
    else:
        found |= _marked(past, processes, found)
    if supervised and isinstance(supervisor.get("cgroup"), str) and supervisor.get("runner") == "systemd":
        grouped = systemd.members(supervisor["cgroup"])
        # While its supervisor lives, the group holds nothing but the run; afterwards `finalize` is in it.
        if is_alive(supervisor["pid"], supervisor["ticks"]):
            found |= grouped
    found -= {os.getpid()}
    if guardian is not None and supervised:
        found -= {guardian.pid}
    return [processes[pid] for pid in found if pid in processes and processes[pid].alive]


def _marked(past: dict[str, Any], processes: dict[int, Process], known: set[int]) -> set[int]:
    """Processes of this user, younger than the run's leader, whose environment names this start."""
    mark = past.get("mark")
    if not isinstance(mark, str):
        return set()  # started by an older agent
    word, found = f"{MARK}={mark}".encode(), set()
    for process in processes.values():
        if process.pid in known or not process.alive or process.ticks < past["ticks"]:
            continue
        with contextlib.suppress(OSError), open(f"/proc/{process.pid}/environ", "rb") as file:
            if word in file.read().split(b"\0"):
                found.add(process.pid)
    return found


def _lock_holders(run: RunPaths) -> set[int]:
    """Processes that inherited the run's lock; not those that only look at it, nor agents that take it briefly."""
    try:
        lock = os.stat(run.lock)
    except OSError as error:
        raise AgentError("internal", f"{run.lock} cannot be read: {error.strerror}", code=3) from None
    found = set()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            for fd in os.listdir(f"/proc/{name}/fd"):
                opened = os.stat(f"/proc/{name}/fd/{fd}")
                if (opened.st_dev, opened.st_ino) == (lock.st_dev, lock.st_ino) and _holds(name, fd):
                    found.add(int(name))
                    break
        except OSError:
            continue
    return {pid for pid in found if name_of(pid) not in (AGENT, SUPERVISOR)}


def _holds(pid: str, fd: str) -> bool:
    """Whether this descriptor is of the very open file that owns an exclusive flock; the kernel says so beside it."""
    with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii", errors="replace") as file:
        return any(line.startswith("lock:") and "FLOCK" in line and "WRITE" in line for line in file)


def _answer(
    run: RunPaths, did: str, *, used: float = 0.0, forced: bool = False, survivors: list[int] | None = None
) -> dict[str, Any]:
    return {"did": did, "state": derive(run), "grace_used": used, "forced": forced, "survivors": survivors or []}
