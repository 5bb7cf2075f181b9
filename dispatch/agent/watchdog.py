"""The memory watchdog: twice a second, beside the supervisor's own work, before the host itself goes down.

On unified memory a job that takes the last gigabytes takes the machine with it: no kernel OOM, no ssh, a power cycle.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from .processes import boot_clock
from .stopping import Stop

GIB = 1 << 30
MEMINFO = "/proc/meminfo"
SECONDS = 0.5
GRACE = 3.0
_RECOVERY_SECONDS = 3.0
_NAME = b"MemAvailable:"


class Floors(NamedTuple):
    """Bytes of available memory below which the watchdog warns, and below which it ends the run; 0 is never."""

    warn: int
    kill: int

    @classmethod
    def usual(cls, total: int | None) -> Floors:
        """16 and 8 GiB; on a small host 12 % and 6 % of its memory, so that it can run at all."""
        if not total:
            return cls(0, 0)
        return cls(min(16 * GIB, total * 12 // 100), min(8 * GIB, total * 6 // 100))

    @classmethod
    def of(cls, launch: dict[str, Any], total: int | None) -> Floors:
        """The floors that a launch description sets; for what it leaves out, the usual ones of this host."""
        usual, given = cls.usual(total), launch.get("memory_floors") or {}
        kill = int(given.get("kill", usual.kill))
        return cls(max(kill, int(given.get("warn", usual.warn))), kill)


def available(fd: int, buffer: bytearray) -> int:
    """MemAvailable in bytes, read from an open /proc/meminfo into a buffer that exists; -1 where it cannot be told."""
    try:
        size = os.preadv(fd, [buffer], 0)
    except OSError:
        return -1
    at = buffer.find(_NAME, 0, size)
    if at < 0:
        return -1
    value, digits = 0, 0
    for position in range(at + len(_NAME), size):
        byte = buffer[position]
        if 48 <= byte <= 57:
            value, digits = value * 10 + byte - 48, digits + 1
        elif digits:
            break
    return value * 1024 if digits else -1


class Watchdog:
    """A thread that looks at the memory and ends the job below the floor, whatever else its supervisor is doing."""

    def __init__(
        self,
        floors: Floors,
        stop: Stop,
        tell: Callable[..., object],
        *,
        meminfo: str = MEMINFO,
        seconds: float = SECONDS,
        grace: float = GRACE,
    ) -> None:
        self._floors = floors
        self._stop = stop
        self._tell = tell
        self._seconds = seconds
        self._grace = grace
        self._over = threading.Event()
        self._buffer = bytearray(8192)
        self._low = False
        self._fd: int | None = None
        self._thread: threading.Thread | None = None
        with contextlib.suppress(OSError):
            self._fd = os.open(meminfo, os.O_RDONLY | os.O_CLOEXEC)

    def start(self) -> None:
        """Begin to look, unless there is no floor or nothing to read."""
        if self._fd is None or available(self._fd, self._buffer) < 0:
            self._note("watchdog-blind", reason="MemAvailable cannot be read: memory is not watched")
        elif self._floors.warn or self._floors.kill:
            self._thread = threading.Thread(target=self._watch, name="lf-watchdog", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Stop looking; a strike that is under way is first brought to its end."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(self._grace + _RECOVERY_SECONDS + 5.0)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _watch(self) -> None:
        while not self._over.wait(self._seconds):
            if self.look():
                return

    def look(self) -> bool:
        """One look; True when it was the last, because the job was ended."""
        assert self._fd is not None
        left = available(self._fd, self._buffer)
        if left < 0 or left >= self._floors.warn:
            self._low = self._low and 0 <= left < self._floors.warn + self._floors.warn // 10
            return False
        if left < self._floors.kill:
            return self._strike(left)
        if not self._low:
            self._low = True
            self._note(
                "memory-low",
                available=left,
                floor=self._floors.warn,
                reason=f"memory is low: {told(left)} available, the run is ended below {told(self._floors.kill)}",
            )
        return False

    def _strike(self, left: int) -> bool:
        reason = f"memory watchdog: {told(left)} available, below the floor of {told(self._floors.kill)}"
        if not self._stop.begin("watchdog", reason, self._grace):
            return True
        self._note("watchdog", available=left, floor=self._floors.kill, reason=reason)
        pause = threading.Event()
        deadline = boot_clock() + self._grace + _RECOVERY_SECONDS
        while not self._stop.advance() and boot_clock() < deadline:
            pause.wait(0.05)
        now = self._reading()
        while now <= left and boot_clock() < deadline:  # freed pages come back with a delay
            pause.wait(0.05)
            now = self._reading()
        rose = now > left
        after = f"{told(now)} after it was ended" if rose else f"still {told(now)} after it was ended: not its memory"
        self._stop.tell(f"{reason}; {after}")
        self._note("watchdog-after", available=now, rose=rose, reason=after)
        return True

    def _reading(self) -> int:
        assert self._fd is not None
        return available(self._fd, self._buffer)

    def _note(self, event: str, **fields: Any) -> None:
        with contextlib.suppress(OSError):  # a full disk must not keep it from its work
            self._tell(event, **fields)


def told(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / GIB:.1f} GiB" if size >= 0 else "an unknown amount"
