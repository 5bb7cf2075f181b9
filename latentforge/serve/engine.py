"""One thread that computes: texts join and leave its batch between two steps, others wait for it in a bounded queue."""

from __future__ import annotations

import itertools
import math
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch

from latentforge.serve.limits import Limits
from latentforge.serve.measures import Measures
from latentforge.serve.refusing import Refusal
from latentforge.students.latent.generate import Batch, Piece
from latentforge.students.latent.requests import Request
from latentforge.writers.opening import Writer

End = Literal["eos", "length", "failed", "deadline", "stopping", "broken", "cancelled"]
_numbers = itertools.count()
_AT_ONCE = 8
"""Texts that are told of a chunk before the loop looks for other requests."""


@dataclass(eq=False)
class Order:
    """A text that is asked for: given up at ``until`` (of ``time.monotonic``). ``hear`` is told of it by the loop's
    thread."""

    request: Request
    until: float
    hear: Callable[[Event], None]
    asked: float = field(default_factory=time.monotonic)
    number: int = field(default_factory=lambda: next(_numbers))
    last: float | None = None  # when its last chunk was written
    given_up: bool = False


class Event(NamedTuple):
    """What a step gave an order: ``end`` says how its text is over, None while it goes on; ``error`` why it failed."""

    order: Order
    tokens: tuple[int, ...]
    draws: int
    end: End | None
    error: str = ""


class Engine:
    """The writer that ``opening`` opens, and what it is asked to write.

    ``post`` runs a function in the thread of the event loop, ``changed`` there when the writer is open and when all is
    over. All methods return at once.
    """

    def __init__(
        self,
        opening: Callable[[], Writer],
        limits: Limits,
        measures: Measures,
        post: Callable[[Callable[[], None]], object],
        changed: Callable[[], None],
    ) -> None:
        self._opening, self._limits, self._measures = opening, limits, measures
        self._post, self._on_change = post, changed
        self._changed = threading.Condition()
        self._waiting: deque[Order] = deque()
        self._running: dict[int, Order] = {}
        self._scoring: deque[tuple[tuple[int, ...], Callable[[list[float] | None], None]]] = deque()
        self._untold: deque[Event] = deque()
        self._writer: Writer | None = None
        self._stop_at: float | None = None
        self.failure: Exception | None = None
        self.cut = 0  # texts that were under way when the grace time was over
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="latentforge-writer", daemon=True)

    def start(self) -> None:
        """Open the writer, then write what is asked for."""
        self._thread.start()

    @property
    def state(self) -> Literal["loading", "ready", "stopping", "failed"]:
        """What it can be asked for: texts only while it is ready."""
        if self.failure is not None:
            return "failed"
        if self._stop_at is not None:
            return "stopping"
        return "loading" if self._writer is None else "ready"

    @property
    def writer(self) -> Writer:
        """The writer; a Refusal (503) where it is not there yet, or not any more."""
        state, writer = self.state, self._writer
        if state != "ready" or writer is None:
            what = {"loading": "the model is being loaded", "stopping": "the server is stopping"}
            raise Refusal(503, what.get(state, "there is no model"), code=state, retry_after=1)
        return writer

    def submit(self, orders: Sequence[Order]) -> None:
        """Let all of them wait, or none: a Refusal, 429 where there is no room, 503 where nothing is written."""
        with self._changed:
            self.writer  # noqa: B018  raises where there is none
            room = self._limits.queue + max(0, self._limits.max_batch - len(self._running)) - len(self._waiting)
            if len(orders) > room:
                waited = time.monotonic() - self._waiting[0].asked if self._waiting else 1.0
                raise Refusal(
                    429,
                    f"{len(self._waiting)} texts wait and {len(self._running)} are written: there is no room for "
                    f"{len(orders)} more",
                    code="queue_full",
                    retry_after=max(1, math.ceil(waited)),
                )
            self._waiting.extend(orders)
            self._measures.queue.set(len(self._waiting))
            self._changed.notify()

    def give_up(self, orders: Iterable[Order]) -> None:
        """Write no further chunk of these; nobody hears of them any more."""
        with self._changed:
            for order in orders:
                order.given_up = True
            self._changed.notify()

    def score(self, text: tuple[int, ...], hear: Callable[[list[float] | None], None]) -> None:
        """Tell ``hear``, in the loop's thread, the log-probability of each token of a text, or None where it cannot."""
        with self._changed:
            if self.ended.is_set():
                self._tell(partial(hear, None))
            else:
                self._scoring.append((text, hear))
                self._changed.notify()

    def stop(self, grace: float) -> int:
        """Take nothing more and cut off, after ``grace`` seconds, what is under way then. Until then what was written
        can still be scored. Returns how many texts are under way now."""
        with self._changed:
            self._stop_at = time.monotonic() + grace
            self._measures.ready.set(0)
            self._changed.notify()
            return len(self._running) + len(self._waiting)

    def _run(self) -> None:
        try:
            self._writer = self._opening()
            self._measures.ready.set(1)
            self._tell(self._on_change)
            batch = Batch(self._writer.model, self._over)
            while self._wait():
                batch = self._turn(self._writer, batch)
        except Exception as error:
            self.failure = error
        finally:
            with self._changed:
                self.ended.set()
                left = [hear for _, hear in self._scoring]
            for hear in left:
                self._tell(partial(hear, None))
            self._tell(self._on_change)

    def _wait(self) -> bool:
        """Whether there is something to do, now that there may be; false when the time of a stop is over."""
        with self._changed:
            while not self._busy():
                left = math.inf if self._stop_at is None else self._stop_at - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
            return True

    def _busy(self) -> bool:
        return bool(self._waiting or self._running or self._scoring)

    def _turn(self, writer: Writer, batch: Batch) -> Batch:
        """Let texts leave and join, and write a chunk of each; the batch to go on with."""
        over, joining = self._change()
        events = [Event(order, (), 0, end) for order, end in over if end != "cancelled"]
        for _, end in over:
            self._measures.texts.labels(end).inc()
        try:
            batch.leave({order.number for order, _ in over})
            events += self._join(batch, joining)
            pieces = batch.step()
        except Exception:
            traceback.print_exc(file=sys.stderr)
            events += [self._end(order, "broken") for order in list(self._running.values())]
            batch, pieces = Batch(writer.model, self._over), []
        events += self._heard(pieces)
        if events:
            self._untold.extend(events)
            self._tell(self._hear)
        self._score(writer)
        return batch

    def _score(self, writer: Writer) -> None:
        """Score one of the texts that wait for it: the others are written on meanwhile."""
        if not self._scoring:
            return
        text, hear = self._scoring.popleft()
        found: list[float] | None = None
        try:
            found = writer.model.score([torch.tensor(text)])[0].tolist()
        except Exception:
            traceback.print_exc(file=sys.stderr)
        self._tell(lambda: hear(found))

    def _change(self) -> tuple[list[tuple[Order, End]], list[Order]]:
        """The orders that are over before they were written to their end, and those that join."""
        now = time.monotonic()
        over: list[tuple[Order, End]] = []
        with self._changed:
            for order in [*self._running.values(), *self._waiting]:
                end = self._end_of(order, now)
                if end is not None:
                    over.append((order, end))
                    self.cut += end == "stopping"
            gone = {order.number for order, _ in over}
            for number in gone:
                self._running.pop(number, None)
            self._waiting = deque(order for order in self._waiting if order.number not in gone)
            free = self._limits.max_batch - len(self._running)
            joining = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            self._running.update((order.number, order) for order in joining)
            self._measures.queue.set(len(self._waiting))
            self._measures.batch.set(len(self._running))
        return over, joining

    def _end_of(self, order: Order, now: float) -> End | None:
        """Why it is over before it is written to its end, if it is."""
        if order.given_up:
            return "cancelled"
        if self._stop_at is not None and now >= self._stop_at:
            return "stopping"
        return "deadline" if now >= order.until else None

    def _over(self) -> set[int]:
        """The numbers of those in the batch that are over by now: asked while a step is computed."""
        now = time.monotonic()
        with self._changed:
            return {number for number, order in self._running.items() if self._end_of(order, now) is not None}

    def _join(self, batch: Batch, joining: Sequence[Order]) -> list[Event]:
        """Begin these texts; the events of those that could not be begun."""
        try:
            batch.join({order.number: order.request for order in joining})
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return [self._end(order, "broken") for order in joining]
        return []

    def _heard(self, pieces: Sequence[Piece]) -> list[Event]:
        now, events = time.monotonic(), []
        if pieces:
            self._measures.step_texts.observe(len(pieces))
        for piece in pieces:
            order = self._running[piece.request]
            if order.last is None:
                self._measures.first_chunk.observe(now - order.asked)
            else:
                self._measures.chunk.observe(now - order.last)
            order.last = now
            if piece.finish is None:
                events.append(Event(order, piece.tokens, piece.draws, None))
            else:
                said = "" if piece.error is None else str(piece.error).partition(": ")[2]
                events.append(self._end(order, piece.finish, piece, said))
        self._measures.chunks.inc(sum(1 for piece in pieces if piece.tokens))
        self._measures.draws.inc(sum(piece.draws for piece in pieces))
        self._measures.produced(sum(len(piece.tokens) for piece in pieces))
        return events

    def _end(self, order: Order, end: End, piece: Piece | None = None, error: str = "") -> Event:
        with self._changed:
            self._running.pop(order.number, None)
            self._measures.batch.set(len(self._running))
        self._measures.texts.labels(end).inc()
        return Event(order, () if piece is None else piece.tokens, 0 if piece is None else piece.draws, end, error)

    def _tell(self, what: Callable[[], None]) -> None:
        """One call of the loop for all events of a step: each would wake it."""
        with suppress(RuntimeError):  # the loop is closed: nobody is left to hear of it
            self._post(what)

    def _hear(self) -> None:
        """In the loop's thread: some at a time, so that other requests are read between them; in their order."""
        for _ in range(min(_AT_ONCE, len(self._untold))):
            event = self._untold.popleft()
            event.order.hear(event)
        if self._untold:
            self._tell(self._hear)
