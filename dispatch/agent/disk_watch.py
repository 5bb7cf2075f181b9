"""The file system of a run, watched while it goes on: a warning first, then an end that still fits on the disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .processes import boot_clock
from .stopping import Stop
from .watchdog import GRACE

SECONDS = 0.5
_MIB = 1 << 20
_AFTER = 2  # one look may fall between a job's last byte and its own end, which is told better by its own code


class DiskWatch:
    """Free bytes and inodes of a folder's file system against their floors."""

    def __init__(self, folder: Path, launch: dict[str, Any], stop: Stop, tell: Callable[..., object]) -> None:
        self._folder = folder
        self._given: dict[str, int] = launch.get("disk_floors") or {}
        self._stop = stop
        self._tell = tell
        self._looked = 0.0
        self._times_low = 0
        self._warned = False

    def look(self) -> None:
        """Look, twice a second at most; below the lower floor the run is ended."""
        if boot_clock() - self._looked < SECONDS:
            return
        self._looked = boot_clock()
        try:
            found = os.statvfs(self._folder)
        except OSError:
            return
        size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
        warn = self._given.get("warn", min(2048 * _MIB, size // 20))
        kill = self._given.get("kill", min(64 * _MIB, size // 100))
        low, end = free < warn, free < kill
        words = f"{free / _MIB:.0f} MiB left on the run's file system"
        if found.f_files and not end:
            few, none = min(10_000, found.f_files // 20), min(1_000, found.f_files // 100)
            if found.f_favail <= few and not low:
                low, words = True, f"{found.f_favail} inodes left on the run's file system"
            end = bool(self._given.get("kill", 1)) and found.f_favail <= none
            words = f"{found.f_favail} inodes left on the run's file system" if end else words
        if low and not self._warned:
            self._warned = True
            self._note("disk-low", reason=f"the disk is running full: {words}")
        self._times_low = self._times_low + 1 if end else 0
        if self._times_low >= _AFTER and self._stop.begin("watchdog", f"disk watchdog: {words}", GRACE):
            self._note("watchdog", reason=f"disk watchdog: {words}")

    def _note(self, event: str, **fields: Any) -> None:
        with contextlib.suppress(OSError):  # on a full disk the exit record says it, whose place was kept
            self._tell(event, **fields)
