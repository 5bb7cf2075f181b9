"""The judgement that goes with following a run: what is noticed on the way, and when there is nothing to wait for."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dispatch.following.activity import Beats
from dispatch.following.limits import Limits
from dispatch.following.lines import LineReader, Lines, single_line
from dispatch.following.losses import LossRules, Remark
from dispatch.following.markers import TextRules
from dispatch.following.pace import fewer_steps, too_fast, too_slow
from dispatch.following.progress import TRAINED, Overdue, Progress
from dispatch.following.record import RULES, WatchRecord, ending_of, failed
from dispatch.hosts.facts import RunState
from latentforge.errors import RefusedError
from latentforge.events import Event, parse_event
from latentforge.verdicts import ExitCode, Verdict

_MOST_WARNINGS = 50
_TWO_BEATS_SECONDS = 12.0
_REPLAYED_BYTES = 64 << 20
_CHUNK = 1 << 20


class Watcher:
    """Takes in what a run tells, in the order in which the host wrote it; speaks only of what is wrong.

    Events of another run are no events of this one. Of the text only warnings and red ever follow.
    """

    def __init__(self, run: str, limits: Limits | None = None) -> None:
        self.run = run
        self.kind = run.partition("-")[0]
        self.limits = limits or Limits.of(None, self.kind)
        self.progress = Progress(self.kind)
        self.beats = Beats()
        self._losses = LossRules()
        self._text = TextRules(run)
        self._remarks: list[Remark] = []
        self._news: list[Remark] = []
        self._told_anything = False
        self._foreign: set[str] = set()
        self._host_said: set[str] = set()
        self._checked_pace = 0.0
        self._since = math.inf
        self._end: dict[str, Any] | None = None

    def state(self, state: RunState, clock: float) -> None:
        """The run's state at a moment of the host's clock."""
        self._state, self._clock = state, clock
        self._since = min(self._since, clock)
        self.progress.not_after(clock)
        self.beats.feed(state.beat, clock)
        if state.warning is not None and state.warning not in self._host_said:
            self._host_said.add(state.warning)
            self._remark(Remark("warning", "host", single_line(state.warning)))
        if state.state in ("running", "unsupervised") and state.seconds is not None:
            self.progress.start(clock - state.seconds)
        elif state.state in ("starting", "finishing"):
            self.progress.seen(clock)

    def events(self, events: list[Event]) -> list[Event]:
        """Take new events in; returns those that are this run's."""
        mine = []
        for event in events:
            if event.run != self.run:
                if event.run not in self._foreign and len(self._foreign) < _MOST_WARNINGS:
                    self._foreign.add(event.run)
                    self._remark(Remark("warning", "foreign", f"an event names run {single_line(event.run, 60)}"))
                continue
            mine.append(event)
            self._told_anything = True
            self.progress.feed(event)
            self._text.feed(event)
            if event.kind == "step":
                for remark in self._losses.feed(event.fields):
                    self._remark(remark)
            elif event.kind == "checkpoint":
                self._checkpoint(event.fields)
            elif event.kind == "end" and (self._end is None or _code_of(self._end) == 0):
                self._end = event.fields  # one that says otherwise than 0 is not taken back
        return mine

    def log(self, lines: Lines) -> Lines:
        """Take new lines of the log in; returns them as they may be shown."""
        self._told_anything = self._told_anything or bool(lines)
        shown, remarks = self._text.read(lines)
        for remark in remarks:
            self._remark(remark)
        return shown

    def appeared(self) -> None:
        """Bytes of the log are there, though not yet a line."""
        self._told_anything = True

    def news(self) -> list[str]:
        """What has been noticed since it was last asked, a line each."""
        fresh, self._news = self._news, []
        return [
            failed(one.rule, self.run, one.text).line() if one.colour == "red" else f"warning: {one.text}"
            for one in fresh
        ]

    def overdue(self) -> WatchRecord | None:
        """Why there is nothing to wait for though the run goes on; None where there is."""
        state = self._state
        if not state.going_on or state.state == "queued":
            return None
        ran = self._clock - self.progress.started if self.progress.started is not None else 0.0
        if ran - self._checked_pace > 30 and (slow := too_slow(self.progress.left, ran, self.limits.overall)):
            self._checked_pace = float("inf")
            self._remark(slow)
        found = self.progress.overdue(self.limits, self._clock, told_anything=self._told_anything)
        if found is None or self._waits_for_a_second_beat():
            return None
        return self._stopped(found)

    def _waits_for_a_second_beat(self) -> bool:
        """Whether who comes late to a run that stands still may soon be told what it does, by the next heartbeat."""
        return len(self.beats) < 2 and self._clock - self._since < min(_TWO_BEATS_SECONDS, self.limits.floor)

    def _stopped(self, found: Overdue) -> WatchRecord:
        activity = self.beats.activity(found.since)
        reason = single_line(f"{found.text}; {activity.text}")
        return self._record(
            found.rule, ExitCode.STALLED, reason, (failed(found.rule, self.run, reason),), activity=activity.kind
        )

    def concluded(self, state: RunState, effective: dict[str, Any], events: list[Event]) -> WatchRecord:
        """The record of a run that has ended; ``events`` are all of it, ``effective`` its effective configuration."""
        ending, code = ending_of(state)
        for remark in self._text.finish():
            self._remark(remark)
        if state.passed and self.kind in TRAINED:
            mine = [event for event in events if event.run == self.run]
            for late in (too_fast(mine, effective), fewer_steps(mine)):
                if late is not None:
                    self._remark(late)
        if state.passed and self.kind != "build" and _code_of(self._end) != 0:
            said = "no end event" if self._end is None else f"an end event with code {self._end.get('code')}"
            self._remark(Remark("red", "no-end", f"its process ended with 0, its events have {said}"))
        verdicts = tuple(
            failed(one.rule, self.run, one.text) for one in self._remarks if one.colour == "red" and one.rule in RULES
        )
        reason = single_line(state.reason or (self._end or {}).get("reason") or "")
        if verdicts and ending == "pass":
            ending, code, reason = "fail", ExitCode.FAIL, verdicts[0].text
        return self._record(ending, code, reason, verdicts)

    def gave_up(self, reason: str) -> WatchRecord:
        """The record of a run whose host stayed unreachable."""
        return self._record("transport lost", ExitCode.UNKNOWN, reason, ())

    def _record(
        self, ending: Any, code: ExitCode, reason: str, verdicts: tuple[Verdict, ...], *, activity: str | None = None
    ) -> WatchRecord:
        return WatchRecord(
            run=self.run,
            ending=ending,
            code=code,
            reason=reason,
            verdicts=verdicts,
            warnings=tuple(one.text for one in self._remarks if one.colour == "warning"),
            mismatches=tuple({"what": one.what, "line": one.line} for one in self._text.mismatches),
            uncounted_mismatches=self._text.uncounted,
            activity=activity,
            step=step if isinstance(step := self.progress.step.get("step"), int) else None,
            telemetry=self.beats.last if activity else {},
        )

    def _checkpoint(self, fields: dict[str, Any]) -> None:
        size, expected, step = fields.get("bytes"), fields.get("expected_bytes"), fields.get("step")
        if isinstance(size, int) and isinstance(expected, int) and size < expected:
            text = f"the checkpoint of step {step} has {size} bytes, its tensors need {expected}"
            self._remark(Remark("red", "small-checkpoint", text))
        elif fields.get("moved") == 0 and fields.get("tensors") and step:
            self._remark(Remark("red", "small-checkpoint", f"no tensor of the checkpoint of step {step} has moved"))

    def _remark(self, remark: Remark) -> None:
        remark = replace(remark, text=single_line(remark.text))  # a run's own words may stand in it
        if len(self._remarks) < _MOST_WARNINGS or remark.colour == "red":
            self._remarks.append(remark)
            self._news.append(remark)


def _code_of(end: dict[str, Any] | None) -> int | None:
    code = (end or {}).get("code")
    return code if isinstance(code, int) and not isinstance(code, bool) else None


class EventTail:
    """Whole lines of the event stream, parsed; what is not an event is skipped, since only the host may judge it."""

    _LONGEST = 1 << 20

    def __init__(self) -> None:
        self._open = b""
        self._drop = False

    def feed(self, data: bytes, anew: bool = False) -> list[Event]:
        """The events that these bytes complete; ``anew`` where the file is read from its start again."""
        if anew:
            self._open, self._drop = b"", False
        *whole, self._open = (self._open + data).split(b"\n")
        events = []
        for line in whole:
            if line.strip() and not self._drop:
                with contextlib.suppress(RefusedError, RecursionError):
                    event = parse_event(line)
                    if math.isfinite(event.t):
                        events.append(event)
            self._drop = False
        if len(self._open) > self._LONGEST:
            self._open, self._drop = b"", True  # no event is as long as that
        return events


def judge_copy(folder: Path, run: str, state: RunState) -> WatchRecord:
    """What the watcher has to say of an ended run, from the copy of its files alone: the same whenever it is asked.

    Of a log beyond 64 MiB the first and the last half of that are read.
    """
    watcher, tail = Watcher(run), EventTail()
    events: list[Event] = []
    for chunk in _chunks(folder / "events.jsonl"):
        found = tail.feed(chunk)
        watcher.events(found)
        events += found
    reader = LineReader()
    for chunk in _chunks(folder / "launch.log", most=_REPLAYED_BYTES):
        watcher.log(reader.feed(chunk))
    watcher.log(reader.feed(b"", final=True))
    try:
        effective = json.loads((folder / "effective.json").read_bytes())
    except (OSError, ValueError):
        effective = {}
    return watcher.concluded(state, effective if isinstance(effective, dict) else {}, events)


def _chunks(path: Path, *, most: int | None = None) -> Iterator[bytes]:
    if not path.is_file():
        return
    size = path.stat().st_size
    with open(path, "rb") as stream:
        if most is None or size <= most:
            yield from iter(lambda: stream.read(_CHUNK), b"")
            return
        for begin in (0, size - most // 2):
            stream.seek(begin)
            for _ in range(most // 2 // _CHUNK):
                yield stream.read(_CHUNK)
