"""What the kernel says about processes killed for memory: without its word, a SIGKILL is just a SIGKILL."""

from __future__ import annotations

import os
from typing import NamedTuple

SIGKILL = 9


class Counters(NamedTuple):
    """OOM kills counted so far: in our control group, and on the whole host; None where the kernel does not tell."""

    group: int | None
    host: int | None


def counters() -> Counters:
    """Read both counters."""
    return Counters(_first(_group_files()), _first(["/proc/vmstat"]))


def judge(signal: int | None, before: Counters, after: Counters) -> tuple[bool | None, str | None]:
    """Whether a job that ended by `signal` was killed for memory (None: cannot be told), and the evidence in words."""
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
    if host or (group is None and host is None):
        return None, evidence
    return False, evidence


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
