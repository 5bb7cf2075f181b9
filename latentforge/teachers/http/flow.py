"""How fast a server is asked: bounded concurrency, waits, fewer entries after a rate limit, a budget; and what came."""

from __future__ import annotations

import math
import queue
import random
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from latentforge.errors import RefusedError
from latentforge.teachers.failures import TeacherFailure

T = TypeVar("T")
_LATENCIES = 4096
# Answers of the last attempt: these requests were not worked on, so that no one is charged for their tokens.
_NOT_HEARD = ("connection", "tls", "timeout", "budget")
_NOT_WORKED_ON = frozenset({"rate-limited", "connection", "tls", "unauthorized", "model-not-found", "refused-request"})


@dataclass(frozen=True)
class Budget:
    """At most so many requests (retries count) and tokens (of prompts and answers); None is no bound."""

    requests: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class _Finished(Generic[T]):
    number: int
    answer: T | None
    error: BaseException | None


class FlowControl:
    """The one gate through which every request to a server goes; safe to use from several threads.

    ``k`` entries a position are asked; after a 429 only ``k_low``, until ``restore_after`` requests with ``k_low`` have
    been answered. A failure that may pass (429, 5xx, time-out, cut, malformed) is tried again up to ``attempts`` times,
    after a wait that doubles from 1 s to ``backoff_cap`` seconds, with jitter; ``Retry-After`` is obeyed by all
    requests, and refused where it is longer than ``patience`` seconds. A server that cannot be reached before it has
    answered anything is not waited for: it is not lost, it was never there. :attr:`notes` are sentences for the log, to
    be taken by the thread that writes it; ``say`` is told the same by the thread that asks.
    """

    def __init__(
        self,
        concurrency: int = 8,
        k: int = 20,
        k_low: int = 10,
        restore_after: int = 10,
        backoff_cap: float = 32.0,
        budget: Budget | None = None,
        *,
        attempts: int = 8,
        patience: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] | None = None,
        jitter: Callable[[], float] = random.random,
        say: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        for name, value in (("concurrency", concurrency), ("k", k), ("k_low", k_low), ("attempts", attempts)):
            if value < 1:
                raise RefusedError(f"{name} = {value}: at least 1 is needed")
        self.concurrency = concurrency
        self.k = k
        self.k_low = k_low
        self.restore_after = restore_after
        self.backoff_cap = backoff_cap
        self.budget = budget or Budget()
        self.attempts = attempts
        self.patience = patience
        self.notes: deque[str] = deque(maxlen=1000)
        self._say = say
        self._clock, self._sleep, self._jitter = clock, sleep, jitter
        self._slots = threading.BoundedSemaphore(concurrency)
        self._lock = threading.Lock()
        self._closed = self._heard = False
        self._waiting: weakref.WeakSet[threading.Event] = weakref.WeakSet()
        self._not_before = -math.inf
        self._limited = False
        self._successes = 0
        self._requests = self._retries = self._rate_limits = self._answered = 0
        self._reserved_tokens = self._answered_tokens = 0
        self._failures: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        self._first = self._last = math.nan

    @property
    def k_now(self) -> int:
        """The entries a position that the next request asks for."""
        return min(self.k, self.k_low) if self._limited else self.k

    def call(
        self,
        ask: Callable[[int], T],
        *,
        tokens: int,
        giving_up: threading.Event | None = None,
        attempts: int | None = None,
    ) -> T:
        """``ask(k)`` until it is answered; ``tokens`` is what one attempt is charged. Raises TeacherFailure.

        ``giving_up``: once set, nothing further is sent. ``attempts``: fewer or more than for others.
        """
        stop = giving_up or threading.Event()
        with self._lock:
            self._waiting.add(stop)
            if self._closed:
                stop.set()
        attempt, most = 0, self.attempts if attempts is None else attempts
        while True:
            attempt += 1
            with self._slots:
                self._await_gate(stop)
                if stop.is_set():
                    raise CancelledError
                k = self._begin(tokens, first=attempt == 1)
                begin = self._clock()
                try:
                    answer = ask(k)
                except TeacherFailure as failure:
                    wait = self._failed(failure, attempt < most, attempt, tokens)
                    if wait is None or stop.is_set():
                        raise
                else:
                    self._succeeded(k, self._clock() - begin, tokens)
                    return answer
            self._pause(wait, stop)

    def each(self, asks: Sequence[Callable[[int], T]], *, tokens: Sequence[int]) -> Iterator[tuple[int, T]]:
        """Yield (index, answer) of every question as soon as it is answered, ``concurrency`` at a time.

        At the first failure no further question is asked; what was in flight is waited for and yielded, for it is paid
        for; then the failure is raised.
        """
        width = min(self.concurrency, len(asks))
        stop, numbers = threading.Event(), iter(range(len(asks)))
        finished: queue.SimpleQueue[_Finished[T] | None] = queue.SimpleQueue()
        # Open questions and answers that wait to be taken together are never more than ``width``: a listener that
        # stores each answer loses no more than that when it is killed.
        room = threading.Semaphore(width)

        def work() -> None:
            while True:
                room.acquire()
                with self._lock:
                    number = None if stop.is_set() else next(numbers, None)
                if number is None:
                    finished.put(None)
                    return
                try:
                    answer = self.call(asks[number], tokens=tokens[number], giving_up=stop)
                except BaseException as error:
                    finished.put(_Finished(number, None, error))
                else:
                    finished.put(_Finished(number, answer, None))

        # Daemons: a server that hangs must not keep a process that was told to end.
        workers = [threading.Thread(target=work, name=f"teacher-{n}", daemon=True) for n in range(width)]
        for worker in workers:
            worker.start()
        failure: BaseException | None = None
        left = len(asks)
        try:
            while width:
                found = finished.get()
                room.release()
                if found is None:
                    width -= 1
                elif found.error is None:
                    left -= 1
                    yield found.number, cast(T, found.answer)
                elif failure is None:
                    failure = found.error
                    stop.set()
            if failure is not None:
                raise failure
            if left:  # somebody gave up, and no question failed
                raise CancelledError
        finally:
            stop.set()
            for _ in workers:
                room.release()

    def give_up(self) -> None:
        """End every wait and send nothing more: what is being asked fails at once. From any thread."""
        with self._lock:
            self._closed = True
            waiting = list(self._waiting)
        for stop in waiting:
            stop.set()

    def metrics(self, *, after: int = 0) -> dict[str, Any]:
        """What came of it so far: counts, seconds of answered requests (p50, p95), tokens a second, k now, failures.

        ``after``: the seconds are of those alone that were answered after the first so many.
        """
        with self._lock:
            new = max(self._answered - after, 0)
            seconds = sorted(list(self._latencies)[max(len(self._latencies) - new, 0) :])
            span = self._last - self._first
            return {
                "requests": self._requests,
                "answered": self._answered,
                "retries": self._retries,
                "hit_rate": 0.0,
                "rows_from_store": 0,
                "p50_s": _quantile(seconds, 0.50),
                "p95_s": _quantile(seconds, 0.95),
                "rate_limit_events": self._rate_limits,
                "tokens": self._answered_tokens,
                "tokens_per_s": self._answered_tokens / span if span > 0 else None,
                "k_now": self.k_now,
                "failures": dict(sorted(self._failures.items())),
            }

    def _begin(self, tokens: int, *, first: bool) -> int:
        with self._lock:
            for name, spent, more, bound in (
                ("requests", self._requests, 1, self.budget.requests),
                ("tokens", self._reserved_tokens, tokens, self.budget.tokens),
            ):
                if bound is not None and spent + more > bound:
                    raise TeacherFailure(
                        "budget", f"{spent} of at most {bound} {name} are spent and the next request needs {more}"
                    )
            self._requests += 1
            self._retries += not first
            self._reserved_tokens += tokens
            if math.isnan(self._first):
                self._first = self._clock()
            return self.k_now

    def _succeeded(self, k: int, seconds: float, tokens: int) -> None:
        restored = False
        with self._lock:
            self._answered += 1
            self._heard = True
            self._answered_tokens += tokens
            self._latencies.append(seconds)
            self._last = self._clock()
            # Answers to questions that were asked with more entries say nothing about what the server takes now.
            if self._limited and k <= self.k_low:
                self._successes += 1
                if self._successes >= self.restore_after:
                    self._limited, restored = False, True
        if restored and self.k > self.k_low:
            self.tell(f"rate limit over: asks for {self.k} entries a position again")

    def _failed(self, failure: TeacherFailure, again: bool, attempt: int, tokens: int) -> float | None:
        """Seconds to wait before the next attempt; None where there is none."""
        wait: float | None = min(self.backoff_cap, 2.0 ** min(attempt - 1, 30)) * (0.5 + 0.5 * self._jitter())
        lowered = False
        with self._lock:
            self._failures[failure.kind] += 1
            self._heard |= failure.kind not in _NOT_HEARD
            if failure.kind in _NOT_WORKED_ON:
                self._reserved_tokens -= tokens
            asked = failure.retry_after or None  # "now", or a past date, is no reason to ask eight times at once
            if asked is not None and failure.passing:
                # Spread, so that all who waited do not come back in the same moment; never earlier than asked.
                wait = asked + self._jitter() * min(1.0, 0.1 * asked)
            if failure.kind == "rate-limited":
                self._rate_limits += 1
                lowered = not self._limited and self.k > self.k_low
                self._limited, self._successes = True, 0
            never = failure.kind == "connection" and not self._heard
            if never or not failure.passing or not again or (asked is not None and asked > self.patience):
                wait = None
            elif failure.kind == "rate-limited" or asked is not None:
                # The limit is the account's, not the request's: nobody asks before.
                self._not_before = max(self._not_before, self._clock() + (asked if asked is not None else wait or 0.0))
        if lowered:
            self.tell(f"rate limited: asks for {self.k_low} entries a position instead of {self.k}")
        return wait

    def tell(self, sentence: str) -> None:
        """A sentence for the log."""
        self.notes.append(sentence)
        self._say(sentence)

    def _await_gate(self, stop: threading.Event) -> None:
        while (left := self._not_before - self._clock()) > 0 and not stop.is_set():
            self._pause(left, stop)

    def _pause(self, seconds: float, stop: threading.Event) -> None:
        if seconds <= 0:
            return
        if self._sleep is not None:
            self._sleep(seconds)
        else:
            stop.wait(seconds)


def flow_of(teacher: object) -> FlowControl | None:
    """The gate of a teacher that has one: a remote one, or a store in front of it."""
    found = getattr(teacher, "flow", None)
    return found if isinstance(found, FlowControl) else None


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]
