"""What each step needs of the teacher, fetched before the step asks for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

Value = TypeVar("Value")
_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Taken(Generic[Value]):
    """What one step was given: ``fetch_seconds`` the teacher took for it, ``wait_seconds`` of them the step stood
    still.
    """

    value: Value
    fetch_seconds: float
    wait_seconds: float

    @property
    def hidden_seconds(self) -> float:
        """What of the fetch went on behind the steps before."""
        return max(0.0, self.fetch_seconds - self.wait_seconds)


class Interrupted(Exception):
    """A step stopped waiting for what it was to be given, since its run was told to stop."""


@dataclass(frozen=True)
class _Fetched(Generic[Value]):
    value: Value | None
    error: BaseException | None
    seconds: float


class Prefetcher(Generic[Value]):
    """``fetch(step)`` for each of ``steps``, in their order, at most ``ahead`` steps before they are taken.

    One thread fetches, one step after the other, so a teacher is asked the same questions in the same order whatever
    ``ahead`` is; with 0 each fetch is made when its step comes. What ``fetch`` raises is raised by :meth:`take` of the
    step that it was for, and nothing is fetched after it. A context: at its end the thread is gone; a fetch that is
    still under way then is told to give up by ``cancel`` and waited for. Where ``interrupted`` says so while a step
    waits, :meth:`take` raises :class:`Interrupted`; not for a fetch with ``ahead`` 0 that nothing can ``cancel``.
    """

    def __init__(
        self,
        fetch: Callable[[int], Value],
        steps: range,
        *,
        ahead: int,
        cancel: Callable[[], None] | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        if ahead < 0 or steps.step != 1:
            raise ValueError(f"cannot fetch {steps} {ahead} ahead")
        self.ahead = ahead
        self._fetch = fetch
        self._cancel = cancel
        self._interrupted = interrupted
        self._steps = steps
        self._next = steps.start
        self._changed = threading.Condition()
        self._ready: dict[int, _Fetched[Value]] = {}
        self._busy = False
        self._stopped = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self.ahead and len(self._steps):
            self._thread = threading.Thread(target=self._work, name="latentforge-prefetch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def take(self, step: int) -> Taken[Value]:
        """What was fetched for ``step``, waiting for it where it is not there yet; steps are taken in their order."""
        if step != self._next or step not in self._steps:
            raise ValueError(f"step {step} is taken where {self._next} of {self._steps} comes next")
        begin = time.perf_counter()
        if self._thread is None:
            value = self._at_once(step)
            self._next = step + 1
            seconds = time.perf_counter() - begin
            return Taken(value, seconds, seconds)
        with self._changed:
            while step not in self._ready:
                if self._stopped:
                    raise RuntimeError("the prefetcher is closed")
                if self._interrupted():
                    raise Interrupted
                self._changed.wait(_LOOK_SECONDS)
            found = self._ready[step]
            if found.error is None:
                del self._ready[step]
                self._next = step + 1
                self._changed.notify_all()
        waited = time.perf_counter() - begin
        if found.error is not None:
            raise found.error
        return Taken(found.value, found.seconds, waited)  # type: ignore[arg-type]

    def close(self) -> None:
        """Stop fetching and wait for the thread; twice is once."""
        if self._thread is None:
            return
        with self._changed:
            self._stopped = True
            busy = self._busy
            self._changed.notify_all()
        if busy and self._cancel is not None:
            self._cancel()
        self._thread.join()
        self._thread = None
        self._ready.clear()

    def _at_once(self, step: int) -> Value:
        if self._cancel is None:
            return self._fetch(step)
        return interruptible(lambda: self._fetch(step), cancel=self._cancel, interrupted=self._interrupted)

    def _work(self) -> None:
        for step in self._steps:
            with self._changed:
                # While step n is computed, n + 1 to n + ahead may be under way or wait here.
                while step >= self._next + self.ahead and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return
                self._busy = True
            begin = time.perf_counter()
            value, error = None, None
            try:
                value = self._fetch(step)
            except BaseException as raised:
                error = raised
            fetched = _Fetched(value, error, time.perf_counter() - begin)
            del value
            with self._changed:
                self._busy = False
                self._ready[step] = fetched
                self._changed.notify_all()
            if fetched.error is not None:
                return
            del fetched


def interruptible(fetch: Callable[[], Value], *, cancel: Callable[[], None], interrupted: Callable[[], bool]) -> Value:
    """What ``fetch`` returns or raises; where ``interrupted`` says so first, it is cancelled and Interrupted raised."""
    with Prefetcher(lambda _: fetch(), range(1), ahead=1, cancel=cancel, interrupted=interrupted) as one:
        return one.take(0).value
