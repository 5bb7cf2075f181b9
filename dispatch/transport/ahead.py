"""Work that is begun before its result is asked for: what waits for a network, while this machine does its own part."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Ahead(Generic[Made]):
    """One piece of work in a thread of its own. Its error is raised where its result is taken, and nowhere else.

    Work that is left is undone when it has ended; nobody waits for that.
    """

    def __init__(self, work: Callable[[], Made], undo: Callable[[], None]) -> None:
        self._work = work
        self._undo = undo
        self._made: list[Made] = []
        self._error: BaseException | None = None
        self._left = self._over = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._made.append(self._work())
        except BaseException as error:
            self._error = error
        with self._lock:
            left = self._left
            self._over = True
        if left:
            self._undo()

    def wait(self) -> None:
        """Return when the work has ended, either way; Ctrl-C interrupts the wait, not the work."""
        self._thread.join()

    def result(self) -> Made:
        """What was made; the error, where there was one."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._made[0]

    def leave(self) -> bool:
        """Want the result no more. True where the work has ended; else it is undone when it has."""
        with self._lock:
            self._left = True
            return self._over
