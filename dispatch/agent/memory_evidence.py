"""What the kernel says about processes killed for memory: without its word, a SIGKILL is just a SIGKILL."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import NamedTuple

SIGKILL = 9
_KILLED = re.compile(r"(?:Out of memory|Memory cgroup out of memory): Kill(?:ed)? process (\d+) ")
_FIRST_PID_NAMESPACE = "pid:[4026531836]"
_RECORD = 8192
_MOST_RECORDS = 200_000
_LOG_SECONDS = 5


class Counters(NamedTuple):
    """OOM kills counted so far: in our control group, and on the whole host; None where the kernel does not tell."""

    group: int | None
    host: int | None


def counters() -> Counters:
    """Read both counters."""
    return Counters(_first(_group_files()), _first(["/proc/vmstat"]))


def judge(
    signal: int | None, before: Counters, after: Counters, excerpt: Callable[[], str | None] = lambda: None
) -> tuple[bool | None, str | None]:
    """Whether a job that ended by `signal` was killed for memory (None: cannot be told), and the evidence in words.

    `excerpt` gives the kernel log's line about this very process; it is only asked where the counters leave it open.
    """
    group, host = _difference(before.group, after.group), _difference(before.host, after.host)
    words = []
    if group:
        words.append(f"cgroup oom_kill +{group}")
    if host:
        words.append(f"host oom_kill +{host}")
    evidence = ", ".join(words) or None
    if signal != SIGKILL:
        return None, evidence
    if group:
        return True, evidence
    if host != 0 and (line := excerpt()) is not None:
        return True, ", ".join([*words, f"kernel: {line}"])
    if host or (group is None and host is None):
        return None, evidence
    return False, evidence


def kernel_line(pid: int, since: float, *, records: Callable[[], list[tuple[float, str]]] | None = None) -> str | None:
    """What the kernel logged about killing `pid` for memory after `since` (monotonic seconds); None without a word.

    Inside a container the kernel's pids are not ours, so there it says nothing about this process.
    """
    if records is None:
        try:
            if os.readlink("/proc/self/ns/pid") != _FIRST_PID_NAMESPACE:
                return None
        except OSError:
            return None
        records = _kernel_log
    for when, message in records():
        found = _KILLED.search(message)
        if found and int(found.group(1)) == pid and when >= since - 1.0:
            return message.strip()[:160]
    return None


def _kernel_log() -> list[tuple[float, str]]:
    """Time and text of the kernel's messages: its own device where that may be read, else the journal's copy."""
    found: list[tuple[float, str]] = []
    try:
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return _journal_log()
    try:
        for _ in range(_MOST_RECORDS):
            try:
                head, _, text = os.read(fd, _RECORD).decode("utf-8", "replace").partition(";")
            except BrokenPipeError:
                continue  # overwritten while we read: the next one is there
            found.append((int(head.split(",")[2]) / 1e6, text.partition("\n")[0]))
    except (OSError, ValueError, IndexError):
        pass
    finally:
        os.close(fd)
    return found or _journal_log()


def _journal_log() -> list[tuple[float, str]]:
    program = shutil.which("journalctl")
    if program is None:
        return []
    command = [program, "--dmesg", "--boot", "--quiet", "--no-pager", "--output=short-monotonic", "--lines=2000"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_LOG_SECONDS, check=True, text=True
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    found = []
    for line in done.stdout.splitlines():
        stamp, _, text = line.lstrip("[ ").partition("]")
        try:
            found.append((float(stamp), text))
        except ValueError:
            continue
    return found


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else max(0, after - before)


def _group_files() -> list[str]:
    files = []
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="replace") as groups:
            for line in groups:
                number, controllers, path = line.rstrip("\n").split(":", 2)
                if number == "0" and not controllers:
                    files.append(os.path.join("/sys/fs/cgroup", path.lstrip("/"), "memory.events"))
                elif "memory" in controllers.split(","):
                    files.append(os.path.join("/sys/fs/cgroup/memory", path.lstrip("/"), "memory.oom_control"))
    except (OSError, ValueError):
        pass
    return files


def _first(files: list[str]) -> int | None:
    for name in files:
        try:
            with open(name, encoding="ascii", errors="replace") as file:
                for line in file:
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
        except (OSError, ValueError):
            continue
    return None
