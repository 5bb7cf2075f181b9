"""Following a run to its end: by bytes from a cursor on, through losses of the link, never longer than it is worth."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from dispatch.following.cursor import STREAMS, Reading
from dispatch.following.limits import Limits
from dispatch.following.lines import LineReader, Lines
from dispatch.following.record import WatchEndedError
from dispatch.following.watcher import EventTail, Watcher
from dispatch.hosts.facts import RunState
from dispatch.places import Places, writing
from dispatch.transport.call import Reply, Transport
from dispatch.transport.link import HostKeyError, LinkError
from latentforge.errors import UnknownOutcomeError
from latentforge.events import Event
from latentforge.verdicts import ExitCode

PATIENCE_SECONDS = 900.0
"""How long an unreachable host is asked again before the command gives up; the run is not affected by either."""

_CHUNK = 2 << 20
_CHANNEL_SECONDS = 60.0
"""How long the host answers over one channel before it is asked again: what a lost reader leaves there ends by then."""
_SILENCE_SECONDS = 15.0
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 10.0


class Observer(Protocol):
    """Somebody who watches a run: a terminal, a pipe, a test."""

    def begin(self, run: str, position: int, of: int) -> None:
        """A run's turn has come."""

    def state(self, state: RunState) -> None:
        """The state, whenever it was asked."""

    def events(self, events: list[Event]) -> None:
        """New events, in order."""

    def log(self, lines: Lines) -> None:
        """New lines of the log, harmless to a terminal."""

    def note(self, line: str) -> None:
        """Something of the watcher's own: a warning, a verdict, a file that was replaced on the host."""

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
    goal: str | None = None
    """The run that a command is about, where it follows others on the way there."""
    adjust: Callable[[Limits], Limits] = field(default=lambda limits: limits)
    """What the user changed of the limits that the pipeline implies."""

    def follow(self, run: str, *, position: int = 1, of: int = 1) -> RunState:
        """Follow to the end; returns the last state, after which no byte comes.

        WatchEndedError where the run stands still, misses a deadline or says nothing; UnknownOutcomeError where the
        host stays unreachable for longer than the patience. Both leave the run alone. Ctrl-C passes through.
        """
        reading = Reading(self.places.followed(self.transport.host.name, run))
        one = _Following(run, reading, self.observer, self.adjust)
        self.observer.begin(run, position, of)
        for name in _FIRST:
            for chunk in reading.chunks(name):
                one.show(name, chunk)
        try:
            for reply in self._replies(one):
                state = RunState.model_validate(reply.result["state"])
                with writing():
                    taken = reading.take(reply.result["streams"], reply.result["order"], reply.payload)
                one.take(state, float(reply.result["clock"]), reply.result["streams"], taken)
                if all(answer["eof"] for answer in reply.result["streams"].values()):
                    one.finish()
                    self.observer.end(state)
                    return state
                if (overdue := one.watcher.overdue()) is not None:
                    overdue.save(reading.folder)
                    raise WatchEndedError(overdue, self._named(run))
        finally:
            with writing():
                reading.save()
        raise AssertionError("a run is followed to its end or to an error")

    def _replies(self, one: _Following) -> Iterator[Reply]:
        """What the host has to say, channel after channel, through losses of the link."""
        lost_at, wait = 0.0, 0.0
        while True:
            streams = {name: one.reading.cursors[name] for name in STREAMS}
            quiet = one.watcher.limits.quiet
            args: dict[str, Any] = {"run": one.run, "streams": streams, "max": _CHUNK}
            args |= {"seconds": _CHANNEL_SECONDS, "quiet": quiet}
            try:
                for reply in self.transport.stream("follow", args, silence=quiet + _SILENCE_SECONDS):
                    lost_at, wait = 0.0, 0.0
                    yield reply
            except HostKeyError as error:
                # Not "nothing was sent" any more: the run was launched over the trusted key.
                error.code = ExitCode.UNKNOWN
                raise
            except LinkError as error:
                now = time.monotonic()
                lost_at = lost_at or now
                if now - lost_at >= self.patience:
                    self._give_up(one, now - lost_at, error)
                wait = min(_LONGEST_WAIT, 2 * wait or _FIRST_WAIT)
                self.observer.unreachable(now - lost_at, error, wait)
                time.sleep(wait)

    def _give_up(self, one: _Following, seconds: float, error: LinkError) -> None:
        what = f"{self.transport.host.name} stayed unreachable for {seconds:.0f} s ({error})"
        one.watcher.gave_up(what).save(one.reading.folder)
        raise UnknownOutcomeError(
            f"{what}; the run is not affected", next=f"latentforge dispatch watch {self._named(self.goal or one.run)}"
        ) from error

    def _named(self, run: str) -> str:
        """How the run is named on a command line: with its host, where no record of this laptop says it."""
        return run if self.places.record(run).is_file() else f"{run} --host {self.transport.host.name}"


class _Following:
    """One run as it is followed: its bytes become events and lines, for the watcher first and then for the observer."""

    def __init__(self, run: str, reading: Reading, observer: Observer, adjust: Callable[[Limits], Limits]) -> None:
        self.run, self.reading, self.observer, self._adjust = run, reading, observer, adjust
        kind = run.partition("-")[0]
        self.watcher = Watcher(run, adjust(Limits.of(None, kind)))
        self._tail, self._lines = EventTail(), LineReader()
        self._identity = b""
        self._gone: set[str] = set()

    def take(
        self, state: RunState, clock: float, answers: dict[str, Any], taken: dict[str, tuple[bytes, bool]]
    ) -> None:
        """One answer of the host: the events before the lines that tell the same."""
        self.watcher.state(state, clock)
        self.observer.state(state)
        for name in sorted(taken, key=_FIRST.index):
            data, anew = taken[name]
            self._mark(name, answers[name], state)
            if data or anew:
                self.show(name, data, anew=anew)
        self._pass_on()

    def show(self, name: str, data: bytes, *, anew: bool = False) -> None:
        """Bytes of one stream."""
        if name == "identity.json":
            self._take_identity(data)
        elif name == "events.jsonl":
            if events := self.watcher.events(self._tail.feed(data, anew)):
                self.observer.events(events)
        else:
            if anew:
                self._lines = LineReader()
            if data:
                self.watcher.appeared()
            if lines := self._lines.feed(data):
                self.observer.log(self.watcher.log(lines))

    def finish(self) -> None:
        """Give the last line, though it has no line end."""
        if lines := self._lines.feed(b"", final=True):
            self.observer.log(self.watcher.log(lines))
        self._pass_on()

    def _take_identity(self, data: bytes) -> None:
        self._identity += data
        try:
            spec = json.loads(self._identity)["spec"]
        except (ValueError, KeyError, TypeError):
            return
        self.watcher.limits = self._adjust(Limits.of(spec if isinstance(spec, dict) else None, self.watcher.kind))

    def _mark(self, name: str, answer: dict[str, Any], state: RunState) -> None:
        """Say what became of a file that was being read."""
        if answer["missing"]:
            if name not in self._gone and self.reading.cursors[name].get("offset") and state.going_on:
                self._gone.add(name)
                self.observer.note(f"({name} was deleted on the host; what was read of it is kept here)")
            return
        self._gone.discard(name)
        how = "replaced" if answer["replaced"] else "truncated" if answer["truncated"] else ""
        if how:
            what = "the log" if name == "launch.log" else name
            self.observer.note(f"({what} was {how} on the host; from its start)")

    def _pass_on(self) -> None:
        for line in self.watcher.news():
            self.observer.note(line)


_FIRST = ("identity.json", "events.jsonl", "launch.log")
"""In the order in which they are taken in: a line that reads as a verdict is backed by an event that is known."""
