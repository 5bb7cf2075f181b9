"""What building data says while it works: phases, how far each is, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

_SECONDS_BETWEEN_PROGRESS = 1.0
_SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class Telling:
    """Who is told: ``phase(name)`` surrounds a phase, ``say`` takes a line, ``progress`` (phase, done, total)."""

    phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext()
    say: Callable[[str], None] = lambda line: None
    progress: Callable[[str, int, int], None] = lambda name, done, total: None


SILENT = Telling()


class Told:
    """Bytes done of bytes in a phase: an event at most once a second and at the end, a line of text twice a minute."""

    def __init__(self, telling: Telling, name: str) -> None:
        self._telling = telling
        self._name = name
        self._begun = self._shown = self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._shown >= _SECONDS_BETWEEN_PROGRESS:
            self._shown = now
            self._telling.progress(self._name, done, total)
        # Before the first byte there is no speed to tell: a large folder is listed for longer than a line waits.
        if done > 0 and now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            speed = done / (now - self._begun)
            self._telling.say(
                f"{self._name}: {done / 1e6:.0f} of {total / 1e6:.0f} MB, {speed / 1e6:.1f} MB/s, "
                f"{(total - done) / speed:.0f} s left at most"
            )
