"""Who is who on this host: boots, clocks, and processes identified by pid and start ticks, never by pid alone."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import NamedTuple

_PR_SET_CHILD_SUBREAPER = 36
#: What processes of the agent call themselves: for people who look at `ps`, and so that a cancel leaves them alone.
AGENT, SUPERVISOR = "lf-agent", "lf-supervisor"
MARK = "LATENTFORGE_MARK"
"""Names the start that a process belongs to: what was adopted by nobody of ours is found by its environment."""


def boot_id() -> str:
    """The kernel's id of this boot; refused nowhere, `unknown` where there is no Linux /proc."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return "unknown"


def boot_clock() -> float:
    """Seconds on the clock that goes on through suspend and does not step with the wall clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Process(NamedTuple):
    """One line of the process table; `ticks` is the start time in clock ticks since boot."""

    pid: int
    state: str
    parent: int
    group: int
    session: int
    ticks: int
    threads: int = 1

    @property
    def alive(self) -> bool:
        """False for zombies: they run nothing and only wait to be reaped. One whose first thread has ended looks like
        one, and lives as long as another thread does."""
        return self.state not in "ZX" or self.threads > 1


def look(pid: int) -> Process | None:
    """The process with this pid; None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    if len(fields) < 20:
        return None
    parent, group, session, threads, ticks = (int(fields[place]) for place in (1, 2, 3, 17, 19))
    return Process(pid, fields[0].decode(), parent, group, session, ticks, threads)


def pids() -> list[int]:
    """The processes that this user can see."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def table() -> dict[int, Process]:
    """Every process that this user can see, by pid."""
    return {process.pid: process for pid in pids() if (process := look(pid)) is not None}


def descendants(of: int, processes: dict[int, Process]) -> set[int]:
    """The pids of all children of `of`, and theirs, without `of` itself."""
    children: dict[int, list[int]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    todo = [of]
    while todo:
        for child in children.get(todo.pop(), []):
            if child not in found:
                found.add(child)
                todo.append(child)
    return found


def own_children() -> set[int] | None:
    """The pids of this process's own children, dead or alive; None where the kernel does not list them.

    Of a subreaper that alone reaps, an empty answer is final: a child that is dying hands its own over in the same
    moment, and whatever comes is put behind what is there. A look at the whole table can miss what forks and dies.
    """
    found: set[int] = set()
    try:
        for thread in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{thread}/children", encoding="ascii") as file:
                found |= {int(pid) for pid in file.read().split()}
    except (OSError, ValueError):
        return None
    return found


def no_core_files() -> None:
    """This process and what it starts leave no core: 1 byte, since 0 is no limit for a handler that is a program."""
    import resource

    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))


def is_alive(pid: object, ticks: object) -> bool:
    """Whether exactly this process (pid and start ticks) still runs."""
    if not isinstance(pid, int) or not isinstance(ticks, int):
        return False
    process = look(pid)
    return process is not None and process.ticks == ticks and process.alive


def send(process: Process, number: int) -> bool:
    """Signal exactly this process through a pidfd, so that a reused pid is never hit.

    False when it is gone, and when it may not be signalled (a job can turn into another user's process): whoever counts
    what is left sees it there.
    """
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    except (AttributeError, OSError):  # no pidfd here: the narrow window of check and kill is all there is
        if not is_alive(process.pid, process.ticks):
            return False
        try:
            os.kill(process.pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True
    try:
        found = look(process.pid)
        if found is None or found.ticks != process.ticks:
            return False
        signal.pidfd_send_signal(fd, number)
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        os.close(fd)
    return True


def call_myself(name: str) -> None:
    """Set this process's short name (at most 15 bytes)."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as file:
        file.write(name)


def name_of(pid: int) -> str | None:
    """The short name of a process; None when it is gone."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return None


def become_subreaper() -> bool:
    """Make orphans among the descendants children of this process; False where the kernel has no such thing."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    try:
        return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False
