"""SIGTERM and Ctrl-C: a training loop ends after its step, with a checkpoint, in the time that it has; anything else
ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The run was told to stop. Not an Exception, so that no library takes it for a failure of its own."""


class Overdue(Interrupted):
    """The time that the run had to end in order is nearly over, and it has not ended."""


SHARE = 0.8
"""Of the time between the signal and the kill: for the step under way and its checkpoint. The rest is for the end."""


class _Stop:
    def __init__(self) -> None:
        self.requested: str | None = None
        self.deferring = 0
        self.grace: float | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        again = self.requested is not None
        self.requested = signal.Signals(number).name
        if not self.deferring or again:
            raise Interrupted(f"interrupted by {self.requested}")
        if self.grace is not None:
            signal.setitimer(signal.ITIMER_REAL, SHARE * self.grace)

    def end(self, number: int, frame: FrameType | None) -> None:
        raise Overdue(
            f"interrupted by {self.requested}: neither the step under way nor its checkpoint was done within "
            f"{SHARE * (self.grace or 0.0):g} of the {self.grace:g} s that there are; the last checkpoint stands"
        )


_STOP = _Stop()


@contextmanager
def handled_signals(grace: float | None = None) -> Iterator[None]:
    """Within, SIGTERM and SIGINT stop the run in order; only for the main thread of a process of its own.

    ``grace`` seconds after the signal the process will be killed: before, what is deferred is given up (Overdue).
    """
    _STOP.requested, _STOP.grace = None, grace
    before = {number: signal.signal(number, _STOP.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _STOP.end)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        # A run that follows in this process was not told to stop.
        _STOP.requested, _STOP.grace = None, None
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
        if _STOP.grace is not None:
            signal.setitimer(signal.ITIMER_REAL, 0.0)


@contextmanager
def whole() -> Iterator[None]:
    """Within, the first signal waits until the end and then does what it would have done, so that what is sent or
    written inside is whole. Nothing where signals are deferred already, and in a thread, which none reaches."""
    if _STOP.deferring or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _STOP.requested
    with deferred_stop():
        yield
    if before is None and _STOP.requested is not None:
        raise Interrupted(f"interrupted by {_STOP.requested}")


def stop_requested() -> str | None:
    """The signal that asked this run to stop, or None."""
    return _STOP.requested
