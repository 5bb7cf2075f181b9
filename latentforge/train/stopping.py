"""SIGTERM and Ctrl-C: a training loop ends after its step, with a checkpoint; anything else ends at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The run was told to stop. Not an Exception, so that no library takes it for a failure of its own."""


class _Stop:
    def __init__(self) -> None:
        self.requested: str | None = None
        self.deferring = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        again = self.requested is not None
        self.requested = signal.Signals(number).name
        if not self.deferring or again:
            raise Interrupted(f"interrupted by {self.requested}")


_STOP = _Stop()


@contextmanager
def handled_signals() -> Iterator[None]:
    """Within, SIGTERM and SIGINT stop the run in order; only for the main thread of a process of its own."""
    _STOP.requested = None
    before = {number: signal.signal(number, _STOP.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred_stop() -> Iterator[None]:
    """Within, the first signal is only noted: the loop asks :func:`stop_requested` after each step."""
    _STOP.deferring += 1
    try:
        yield
    finally:
        _STOP.deferring -= 1


def stop_requested() -> str | None:
    """The signal that asked this run to stop, or None."""
    return _STOP.requested
