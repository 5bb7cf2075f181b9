"""What a run's events add up to at a moment: the part of the display that needs no terminal."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from dispatch.following.lines import single_line
from latentforge.errors import RefusedError
from latentforge.events import Event
from latentforge.verdicts import Outcome, Verdict

_KEPT_LOSSES = 2000


@dataclass
class RunView:
    """The state of a run as its events tell it."""

    run: str
    phase: str = ""
    done: int | None = None
    total: int | None = None
    model: str = ""
    last: dict[str, Any] = field(default_factory=dict)
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT_LOSSES))
    phases: dict[str, float] = field(default_factory=dict)
    compiles: int = 0
    ready: bool = False
    checkpoint: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    memory_bytes: int | None = None
    end: dict[str, Any] = field(default_factory=dict)
    begun: float | None = None
    now: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds from the first event to the last, on the host's clock."""
        return 0.0 if self.begun is None or self.now is None else self.now - self.begun

    def feed(self, event: Event) -> None:
        """Take one event in."""
        if self.begun is None:
            self.begun = event.t
        self.now = event.t
        fields = event.fields
        match event.kind:
            case "phase":
                self._phase(fields)
            case "step":
                self._step(fields)
            case "checkpoint":
                self.checkpoint = fields
            case "compile":
                self.compiles += 1 if self.ready else 0
            case "memory":
                known = [value for value in fields.values() if isinstance(value, int)]
                self.memory_bytes = max(known, default=self.memory_bytes)
            case "warning":
                self.warnings.append(single_line(fields.get("message", "")))
            case "verdict":
                if (verdict := verdict_of(event)) is not None:
                    self.verdicts.append(verdict)
            case "end":
                self.end = fields

    def _phase(self, fields: dict[str, Any]) -> None:
        name, state = single_line(fields.get("name", ""), 40), fields.get("state")
        if name == "ready":
            self.ready, self.compiles = True, 0
        elif state == "end":
            self.phases[name] = self.phases.get(name, 0.0) + (_number(fields.get("seconds")) or 0.0)
        else:
            if name != self.phase:
                self.done = self.total = None
            self.phase = name
            if state == "progress":
                self.done, self.total = _count(fields.get("done")), _count(fields.get("total"))

    def _step(self, fields: dict[str, Any]) -> None:
        if single_line(fields.get("model", ""), 40) != self.model:
            self.model = single_line(fields.get("model", ""), 40)
            self.losses.clear()
        self.last = fields
        self.done, self.total = _count(fields.get("step")), _count(fields.get("steps"))
        if isinstance(loss := fields.get("loss"), int | float):
            self.losses.append(float(loss))
        if isinstance(memory := fields.get("memory_bytes"), int):
            self.memory_bytes = memory


def verdict_of(event: Event) -> Verdict | None:
    """The verdict that an event states; None where it states none that can be read."""
    fields = event.fields
    try:
        outcome = Outcome[str(fields["outcome"]).upper()]
        measured = fields.get("measured")
        text = single_line(fields.get("text", ""))  # a text of two lines must not make a FAIL unreadable
        measured = measured if isinstance(measured, dict) else {}
        return Verdict(str(fields["falsifier"]), outcome, text, measured, event.run)
    except (KeyError, ValueError, RefusedError):
        return None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _count(value: Any) -> int | None:
    """A count as an event holds it; a run may have written anything there."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None


def short(run: str) -> str:
    """A run's name where there is little room: enough of it to name it to a command."""
    kind, _, digits = run.partition("-")
    return f"{kind}-{digits[:6]}" if len(digits) > 6 else run


def duration(seconds: float) -> str:
    """Seconds as people read them: 8.1 s, or 00:03:12."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def sparkline(values: list[float], width: int) -> str:
    """The values as a row of at most ``width`` bars, each the mean of its share."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if not finite:
        return ""
    size = max(1, -(-len(finite) // width))
    means = [sum(part) / len(part) for part in (finite[i : i + size] for i in range(0, len(finite), size))]
    low, high = min(means), max(means)
    bars = "▁▂▃▄▅▆▇█"
    return "".join(bars[int((value - low) / (high - low) * 7.999) if high > low else 3] for value in means)
