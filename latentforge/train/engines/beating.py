"""Signs of life of the processes of one run on this host: each beats by itself, and whoever started them looks."""

from __future__ import annotations

import os
import time
from pathlib import Path
from threading import Thread
from typing import IO

BEAT_SECONDS = 1.0
HUNG_SECONDS = 120.0
"""A process that runs at all beats once a second, whatever it computes or waits for: torch leaves the interpreter to
other threads in every operator. One that is silent for so long was stopped, or hangs where no thread of it gets on, and
the others would wait for it in a collective call."""


def beat(descriptor: int) -> None:
    """Beat into ``descriptor`` from now on, in a thread that ends with the process."""

    def beating() -> None:
        count = 0
        while True:
            count += 1
            os.pwrite(descriptor, count.to_bytes(8, "little"), 0)
            time.sleep(BEAT_SECONDS)

    Thread(target=beating, name="lf-beat", daemon=True).start()


class Pulse:
    """The beats of the process ``pid``, which come into ``file``, as this process sees them when it looks."""

    def __init__(self, pid: int, file: IO[bytes]) -> None:
        self.pid, self._file = pid, file
        self._seen, self._silent, self._looked = b"", 0.0, time.monotonic()

    def hangs(self) -> str | None:
        """How a process that was silent for too long is found; None while it beats."""
        now, found = time.monotonic(), os.pread(self._file.fileno(), 8, 0)
        # Where this process slept itself, nobody looked: that is no silence of the other.
        looked = min(now - self._looked, BEAT_SECONDS)
        self._silent = self._silent + looked if found == self._seen else 0.0
        self._seen, self._looked = found, now
        return self._state() if self._silent > HUNG_SECONDS else None

    def _state(self) -> str:
        """As the kernel calls it: ``T (stopped)``."""
        try:
            said = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        except OSError:
            return "gone"
        return next(line.split(":", 1)[1].strip() for line in said.splitlines() if line.startswith("State:"))
