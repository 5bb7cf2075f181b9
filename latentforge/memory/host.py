"""The memory of this host, read where the kernel states it: never from a GPU's tools, which do not know on GB10."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class HostMemory:
    """Bytes that this process can count on: all that there is, and what is free now; None where it is not told.

    A memory limit of the process's control group is smaller than the machine, and counts. ``limited`` says so.
    """

    total: int | None
    available: int | None
    limited: bool = False

    @classmethod
    def read(cls, proc: Path = PROC, cgroups: Path = CGROUPS) -> Self:
        """This host as the kernel tells it now."""
        known = _meminfo(proc / "meminfo")
        total, available = known.get("MemTotal"), known.get("MemAvailable")
        limited = False
        for folder in _groups(proc / "self" / "cgroup", cgroups):
            limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
            if limit is None or (total is not None and limit >= total):
                continue
            total, limited = limit, True
            # Pages of files are given back when they are wanted, as MemAvailable counts them too.
            free = limit - (used or 0) + _cached(folder / "memory.stat")
            available = free if available is None else min(available, free)
        return cls(total, available, limited)


def _meminfo(file: Path) -> dict[str, int]:
    try:
        lines = file.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isdigit():
            found[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return found


def _groups(file: Path, cgroups: Path) -> list[Path]:
    """The folders of this process's control group (version 2) and of those that it lies in."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    path = next((line[3:] for line in lines if line.startswith("0::")), None)
    if path is None:
        return []
    own = cgroups / path.strip("/")
    return [own, *(parent for parent in own.parents if parent == cgroups or cgroups in parent.parents)]


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cached(file: Path) -> int:
    try:
        words = [line.split() for line in file.read_text(encoding="ascii", errors="replace").splitlines()]
    except OSError:
        return 0
    return sum(int(word[1]) for word in words if len(word) == 2 and word[0] in ("inactive_file", "active_file"))
