"""How far a run has come, by its events, and whether what it is at takes too long: all on the host's clock."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from dispatch.following.limits import Limits
from dispatch.following.losses import middle_of
from latentforge.events import Event

TRAINED = frozenset({"teacher", "distill", "latent", "autoencoder"})
_KEPT = 50


@dataclass(frozen=True)
class Overdue:
    """What takes too long: which rule says so, since when, for how long, and how long it was allowed."""

    rule: Literal["stalled", "deadline", "log never appeared", "still running at the deadline"]
    doing: str
    since: float
    seconds: float
    allowed: float
    text: str


class Progress:
    """The phases and steps of a run.

    Loading ends with phase ``load``, warming up with the ready event, then comes the first step; each has a deadline
    from its own beginning. Between steps the pace that the run has shown decides. Everything else (evaluation, saving,
    the phases of a run that trains nothing) has a deadline from the last sign of progress.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.started: float | None = None
        self._seen: float | None = None
        self._now = math.inf
        self.loaded: float | None = None
        self.ready: float | None = None
        self.first_step: float | None = None
        self.step: dict[str, Any] = {}
        self.step_at = 0.0
        self.last: float | None = None
        self.doing = "starting"
        self._intervals: deque[float] = deque(maxlen=_KEPT)
        self._between_steps = False
        self._counts: dict[str, Any] = {}

    def start(self, clock: float) -> None:
        """The run's process started at this moment."""
        if self.started is None:
            self.started = clock

    def seen(self, clock: float) -> None:
        """Something is under way since this moment at the latest, though when the process started is not known yet."""
        if self._seen is None:
            self._seen = clock

    def not_after(self, clock: float) -> None:
        """Nothing can have happened after this moment: an event that says so is of now, or no stall would ever end."""
        self._now = clock
        for name in ("loaded", "ready", "first_step", "last"):
            if (at := getattr(self, name)) is not None and at > clock:
                setattr(self, name, clock)
        self.step_at = min(self.step_at, clock)
        if self._intervals and max(self._intervals) > clock:  # longer than the host is up
            self._intervals.clear()

    def feed(self, event: Event) -> None:
        """Take an event in."""
        fields, at = event.fields, min(event.t, self._now)
        if event.kind == "phase":
            self._phase(str(fields.get("name", "")), fields, at)
        elif event.kind == "step":
            self._step(fields, at)
        elif event.kind in ("checkpoint", "metric", "verdict", "end"):
            self._between_steps = self._between_steps and event.kind == "checkpoint"
            self.last = at

    def _phase(self, name: str, fields: dict[str, Any], at: float) -> None:
        state = fields.get("state")
        if state == "progress":
            if self._counts.get(name) == fields.get("done"):
                return  # said again, not gone on
            self._counts[name] = fields.get("done")
        elif name == "ready":
            self.ready = at
        elif name == "load" and state == "end":
            self.loaded = at
        self._between_steps = False
        self.doing = name
        self.last = at

    def _step(self, fields: dict[str, Any], at: float) -> None:
        if self.first_step is None:
            self.first_step = at
        if self._between_steps and fields.get("model") == self.step.get("model"):
            self._intervals.append(max(0.0, at - self.step_at))
        elif fields.get("model") != self.step.get("model"):
            self._intervals.clear()
        step, steps = fields.get("step"), fields.get("steps")
        self.step, self.step_at, self.last = fields, at, at
        self._between_steps = not (isinstance(step, int) and isinstance(steps, int) and step >= steps)
        self.doing = "training" if self._between_steps else "ending"

    @property
    def expected(self) -> float | None:
        """Seconds a step, by the median of the last ones."""
        return middle_of(self._intervals) if self._intervals else None

    @property
    def left(self) -> float | None:
        """Seconds that the steps of this model still take at that pace."""
        step, steps = self.step.get("step"), self.step.get("steps")
        if self.expected is None or not isinstance(step, int) or not isinstance(steps, int):
            return None
        return max(0, steps - step) * self.expected

    def overdue(self, limits: Limits, clock: float, *, told_anything: bool) -> Overdue | None:
        """What takes too long at this moment of the host's clock; None where nothing does."""
        started = self._seen if self.started is None else self.started
        if started is None:
            return None
        ran = clock - started
        if limits.overall is not None and ran > limits.overall:
            where = f" at step {self.step['step']}" if "step" in self.step else ""
            text = f"still running{where} after {ran:.0f} s (deadline {limits.overall:.0f} s)"
            return Overdue("still running at the deadline", self.doing, started, ran, limits.overall, text)
        if not told_anything:
            if ran > limits.appear:
                text = f"it runs for {ran:.0f} s and has written no log and no event (deadline {limits.appear:.0f} s)"
                return Overdue("log never appeared", "starting", started, ran, limits.appear, text)
            return None
        if self._between_steps:
            return self._standing_still(limits, clock)
        doing, since, allowed = self._phase_now(limits, started)
        if clock - since <= allowed:
            return None
        text = f"{doing} for {clock - since:.0f} s (deadline {allowed:.0f} s)"
        return Overdue("deadline", doing, since, clock - since, allowed, text)

    def _standing_still(self, limits: Limits, clock: float) -> Overdue | None:
        last = self.step_at if self.last is None else self.last
        if self._intervals:
            pace = middle_of(self._intervals)
            allowed = max(limits.floor, limits.factor * pace, 2 * max(self._intervals))
            expected = f"expected {pace:.2g} s"
        else:
            allowed = max(limits.floor, limits.first_step)
            expected = f"expected within {allowed:.0f} s"
        if clock - last <= allowed:
            return None
        step, steps = self.step.get("step"), self.step.get("steps")
        text = f"no step for {clock - last:.0f} s after step {step}/{steps} ({expected})"
        return Overdue("stalled", "training", last, clock - last, allowed, text)

    def _phase_now(self, limits: Limits, started: float) -> tuple[str, float, float]:
        """What it is at, since when, and how long that may take."""
        if self.kind in TRAINED and self.first_step is None:
            if self.ready is not None:
                return "ready, and no first step", self.ready, limits.first_step
            if self.loaded is not None:
                return "warming up", self.loaded, limits.warm_up
            return "loading", started, limits.loading
        return self.doing, started if self.last is None else self.last, limits.other
