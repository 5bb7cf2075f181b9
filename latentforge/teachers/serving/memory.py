"""Whether the memory of a process tree has come back, as the kernel counts it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GIB = float(1 << 30)
_SECONDS = 240.0
_EVERY = 0.1


@dataclass(frozen=True)
class MemoryReturn:
    """MemAvailable in bytes before a start and after the stop; ``margin`` is what may be missing."""

    before: int
    after: int
    margin: int
    seconds: float

    @property
    def returned(self) -> bool:
        """Whether it is back."""
        return self.after >= self.before - self.margin

    def __str__(self) -> str:
        figures = f"{self.after / GIB:.1f} GiB available, {self.before / GIB:.1f} before it started"
        if self.returned:
            return f"memory is back: {figures}"
        missing = (self.before - self.after) / GIB
        return f"memory is NOT back after {self.seconds:.0f} s: {figures}; {missing:.1f} GiB are held by something else"


def available() -> int:
    """MemAvailable in bytes; the GPU of a machine with one pool is counted in it."""
    return _meminfo("MemAvailable")


def margin() -> int:
    """What may be missing: 4 GiB as on a GB10 of 128, less on smaller machines."""
    return min(4 << 30, _meminfo("MemTotal") // 16)


def wait_for_return(
    before: int,
    *,
    allowed: int | None = None,
    seconds: float = _SECONDS,
    read: Callable[[], int] = available,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> MemoryReturn:
    """Wait until MemAvailable is within ``allowed`` bytes of ``before``, at most ``seconds``; never raises."""
    allowed = margin() if allowed is None else allowed
    began = clock()
    while True:
        found = MemoryReturn(before, read(), allowed, clock() - began)
        if found.returned or found.seconds >= seconds:
            return found
        pause(_EVERY)


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/meminfo has no {name}")
