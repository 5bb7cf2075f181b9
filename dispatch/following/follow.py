"""Following a run to its end: by bytes from a cursor on, through losses of the link, never longer than it lasts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential

from dispatch.following.cursor import STREAMS, Reading
from dispatch.hosts.facts import RunState
from dispatch.hosts.trust import HostKeyError
from dispatch.places import Places, writing
from dispatch.transport.call import Reply, Transport
from dispatch.transport.link import LinkError
from latentforge.errors import RefusedError, UnknownOutcomeError
from latentforge.events import Event, parse_event
from latentforge.verdicts import ExitCode

LONG_POLL_SECONDS = 10.0
PATIENCE_SECONDS = 900.0
"""How long an unreachable host is asked again before the command gives up; the run is not affected by either."""

_CHUNK = 1 << 20


class Observer(Protocol):
    """Somebody who watches a run: a terminal, a pipe, a test."""

    def begin(self, run: str, position: int, of: int) -> None:
        """A run's turn has come."""

    def state(self, state: RunState) -> None:
        """The state, whenever it was asked."""

    def events(self, events: list[Event]) -> None:
        """New events, in order."""

    def log(self, data: bytes, *, anew: bool) -> None:
        """New bytes of the log; ``anew`` where the file was replaced or truncated and is read from its start."""

    def unreachable(self, seconds: float, error: BaseException, retry_in: float) -> None:
        """The host has not answered for so long."""

    def end(self, state: RunState) -> None:
        """The run's last bytes have been given."""


@dataclass
class Follower:
    """Follows runs of one host, one after the other."""

    transport: Transport
    places: Places
    observer: Observer
    patience: float = PATIENCE_SECONDS
    poll: float = LONG_POLL_SECONDS
    goal: str | None = None
    """The run that a command is about, where it follows others on the way there."""

    def follow(self, run: str, *, position: int = 1, of: int = 1) -> RunState:
        """Follow to the end; returns the last state, after which no byte comes.

        UnknownOutcomeError where the host stays unreachable for longer than the patience. Ctrl-C passes through.
        """
        reading = Reading(self.places.followed(self.transport.host.name, run))
        tail = _EventTail()
        self.observer.begin(run, position, of)
        for name in STREAMS:
            if stored := reading.stored(name):
                self._show(name, stored, False, tail)
        known, pause = "", 0.0
        while True:
            time.sleep(pause)
            begin = time.monotonic()
            reply = self._read(run, reading, known)
            pause = _pause(pause, time.monotonic() - begin, len(reply.payload))
            state = RunState.model_validate(reply.result["state"])
            known = state.state
            with writing():
                taken = reading.take(reply.result["streams"], reply.result["order"], reply.payload)
            self.observer.state(state)
            for name, (data, anew) in taken.items():
                self._show(name, data, anew, tail)
            if all(answer["eof"] for answer in reply.result["streams"].values()):
                self.observer.end(state)
                return state

    def _show(self, name: str, data: bytes, anew: bool, tail: _EventTail) -> None:
        if name == "launch.log" and (data or anew):
            self.observer.log(data, anew=anew)
        elif name == "events.jsonl" and (events := list(tail.feed(data, anew))):
            self.observer.events(events)

    def _read(self, run: str, reading: Reading, known: str) -> Reply:
        args: dict[str, Any] = {"run": run, "streams": reading.cursors, "max": _CHUNK, "wait": self.poll}
        if known:
            args["known_state"] = known
        else:
            args["wait"] = 0.0
        since = time.monotonic()

        def tell(state: RetryCallState) -> None:
            assert state.outcome is not None
            error = state.outcome.exception()
            assert error is not None
            self.observer.unreachable(time.monotonic() - since, error, state.upcoming_sleep)

        retrying = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, LinkError)),
            wait=wait_exponential(multiplier=0.25, max=10.0),
            stop=stop_after_delay(self.patience),
            before_sleep=tell,
            reraise=True,
        )
        try:
            reply: Reply = retrying(self.transport.call, "read", args, timeout=self.poll + 20.0)
        except HostKeyError as error:
            # Not "nothing was sent" any more: the run was launched over the trusted key.
            error.code = ExitCode.UNKNOWN
            raise
        except LinkError as error:
            raise UnknownOutcomeError(
                f"{self.transport.host.name} stayed unreachable for {time.monotonic() - since:.0f} s ({error}); "
                f"the run is not affected",
                next=f"latentforge dispatch watch {self.goal or run}",
            ) from error
        return reply


def _pause(pause: float, took: float, size: int) -> float:
    """Seconds until the next question.

    A run that tells something all the time would be asked without a break, and each question is a process on its host,
    beside the training. So questions that find something thin out, to about a tenth of the time.
    """
    return min(2.0, 8.0 * took, max(0.1, 2.0 * pause)) if size else 0.0


class _EventTail:
    """Whole lines of the event stream, parsed; what is not an event is skipped, since only the host may judge it."""

    def __init__(self) -> None:
        self._open = b""

    def feed(self, data: bytes, anew: bool) -> Iterator[Event]:
        if anew:
            self._open = b""
        *whole, self._open = (self._open + data).split(b"\n")
        for line in whole:
            if line.strip():
                with contextlib.suppress(RefusedError):
                    yield parse_event(line)
