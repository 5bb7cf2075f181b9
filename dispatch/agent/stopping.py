"""Ending a job from beside it: TERM for every process of its tree, a grace, KILL for whatever is left."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

from .processes import Process, boot_clock, send


class Stop:
    """An end that somebody other than the job decided on; the first reason stands, any thread may carry it out."""

    def __init__(self, members: Callable[[], list[Process]]) -> None:
        self._members = members
        self._guard = threading.Lock()
        self._asked: set[tuple[int, int]] = set()
        self._deadline = 0.0
        self.why: tuple[str, str] | None = None
        """The class and the reason that the exit record will carry; None while nothing was decided."""

    def begin(self, kind: str, reason: str, grace: float) -> bool:
        """Decide to end the job; False when that was decided already."""
        with self._guard:
            if self.why is not None:
                return False
            self._deadline = boot_clock() + grace
            self.why = (kind, reason)
        self.advance()
        return True

    def tell(self, reason: str) -> None:
        """Say more about a decision that was taken."""
        with self._guard:
            if self.why is not None:
                self.why = (self.why[0], reason)

    def advance(self) -> bool:
        """Signal those that were not yet signalled, or all of them once the grace is over; True when none is left."""
        with self._guard:
            if self.why is None:
                return False
            members = self._members()
            late = boot_clock() >= self._deadline
            for process in members:
                if late:
                    send(process, signal.SIGKILL)
                elif (process.pid, process.ticks) not in self._asked:
                    self._asked.add((process.pid, process.ticks))
                    send(process, signal.SIGTERM)
                    send(process, signal.SIGCONT)  # a stopped process would sleep through its grace
            return not members
