"""How following a run ended, as a record that the laptop keeps and the manifest quotes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dispatch.hosts.facts import RunState
from dispatch.places import write_atomic, writing
from latentforge.errors import LatentForgeError
from latentforge.verdicts import ExitCode, Outcome, Verdict

VERDICT_FILE = "verdict.json"

Ending = Literal[
    "pass",
    "fail",
    "refused",
    "unknown",
    "crashed",
    "killed",
    "cancelled",
    "lost",
    "interrupted",
    "absent",
    "stalled",
    "deadline",
    "log never appeared",
    "still running at the deadline",
    "transport lost",
]
"""A run's own outcomes; then those of a run that its host lost; then what made the watcher stop while it went on."""

RULES = {
    "stalled": "F-DISTILL-LIVENESS-001",
    "deadline": "F-DISTILL-LIVENESS-002",
    "log never appeared": "F-DISTILL-LIVENESS-002",
    "still running at the deadline": "F-DISTILL-LIVENESS-002",
    "too-fast": "F-DISTILL-LIVENESS-003",
    "steps": "F-DISTILL-LIVENESS-003",
    "not-finite": "F-DISTILL-LIVENESS-004",
    "diverged": "F-DISTILL-LIVENESS-004",
    "checkpoint": "F-DISTILL-LIVENESS-005",
    "small-checkpoint": "F-DISTILL-LIVENESS-005",
    "no-end": "F-DISTILL-LIVENESS-005",
}
"""The falsifier (contracts/watching.yaml) that stands behind each way in which the watcher itself says FAIL."""


def failed(rule: str, run: str, text: str) -> Verdict:
    """The watcher's own verdict: it only ever fails a run."""
    return Verdict(RULES[rule], Outcome.FAIL, text, {}, run)


@dataclass(frozen=True)
class WatchRecord:
    """What the watcher concluded of one run, and what it noticed on the way."""

    run: str
    ending: Ending
    code: ExitCode
    reason: str = ""
    verdicts: tuple[Verdict, ...] = ()
    warnings: tuple[str, ...] = ()
    mismatches: tuple[dict[str, str], ...] = ()
    uncounted_mismatches: int = 0
    activity: str | None = None
    step: int | None = None
    seconds: float | None = None
    telemetry: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The record as data."""
        value = asdict(self)
        return {**value, "schema": 1, "code": int(self.code), "verdicts": [one.line() for one in self.verdicts]}

    def save(self, folder: Path) -> None:
        """Keep it beside the cursor of the run, unless the same stands there."""
        content = json.dumps(self.as_json(), indent=1, ensure_ascii=False).encode() + b"\n"
        path = folder / VERDICT_FILE
        if not (path.is_file() and path.read_bytes() == content):
            with writing():
                write_atomic(path, content)


class WatchEndedError(LatentForgeError):
    """Following ended though the run goes on: it stands still, is too slow, or says nothing (exit code 4)."""

    default_code = ExitCode.STALLED

    def __init__(self, record: WatchRecord, where: str) -> None:
        again = f"watch it again:  latentforge dispatch watch {where}"
        stop = f"stop it:         latentforge dispatch cancel {where}"
        super().__init__(f"{record.run} {record.reason}; it was left alone", next=f"{stop}\n{again}", code=record.code)
        self.record = record


def ending_of(state: RunState) -> tuple[Ending, ExitCode]:
    """How a run that its host reports as ended did end, and the exit code that follows."""
    if state.state in ("lost", "interrupted"):
        return ("lost" if state.state == "lost" else "interrupted"), ExitCode.UNKNOWN
    if state.state in ("absent", "reserved"):
        return "absent", ExitCode.CRASHED
    known: dict[str, tuple[Ending, ExitCode]] = {
        "pass": ("pass", ExitCode.PASS),
        "fail": ("fail", ExitCode.FAIL),
        "refused": ("refused", ExitCode.REFUSED),
        "crashed": ("crashed", ExitCode.CRASHED),
        "killed": ("killed", ExitCode.CRASHED),
        "cancelled": ("cancelled", ExitCode.CRASHED),
    }
    return known.get(state.outcome or "", ("unknown", ExitCode.UNKNOWN))
