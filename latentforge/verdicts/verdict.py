"""A falsifier's verdict, the lattice that joins several, and the line that a log shows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from latentforge.verdicts.exitcode import ExitCode

FALSIFIER_ID = re.compile(r"F-[A-Z0-9]+(?:-[A-Z0-9]+)*-[0-9]{3}")
_LINE = re.compile(rf"({FALSIFIER_ID.pattern}) (PASS|FAIL|UNKNOWN)(?: run=([a-z]+-[0-9a-f]{{20}}))?(?: (.*))?")


class Outcome(IntEnum):
    """A verdict's value. The order is the lattice: only PASS arms, and nothing that is unknown turns green."""

    FAIL = 0
    UNKNOWN = 1
    PASS = 2


def meet(outcomes: Iterable[Outcome]) -> Outcome:
    """The worst of several outcomes; of none at all, UNKNOWN, since nothing was shown."""
    return min(outcomes, default=Outcome.UNKNOWN)


def exit_code(outcome: Outcome) -> ExitCode:
    """The exit code that an outcome earns."""
    return {Outcome.FAIL: ExitCode.FAIL, Outcome.UNKNOWN: ExitCode.UNKNOWN, Outcome.PASS: ExitCode.PASS}[outcome]


@dataclass(frozen=True)
class Verdict:
    """What one falsifier said of one run.

    ``text`` states the measured comparison in one line (``val_loss 3.04 < 4.91 at step 500``), ``measured`` the same
    values as data. ``run`` is the run id, or None for a check that belongs to no run.
    """

    falsifier: str
    outcome: Outcome
    text: str
    measured: dict[str, Any] = field(default_factory=dict)
    run: str | None = None

    def __post_init__(self) -> None:
        if not FALSIFIER_ID.fullmatch(self.falsifier):
            raise ValueError(f"{self.falsifier!r} is not a falsifier id (F-NAME-001)")
        if "\n" in self.text or "\r" in self.text:
            raise ValueError(f"verdict text of {self.falsifier} has more than one line: {self.text!r}")

    def line(self) -> str:
        """The line that logs and terminals show; :func:`parse_line` reads it back."""
        parts = [self.falsifier, self.outcome.name]
        if self.run is not None:
            parts.append(f"run={self.run}")
        if self.text:
            parts.append(self.text)
        return " ".join(parts)


def parse_line(line: str) -> Verdict | None:
    """The verdict that a log line states, or None where the line is not one. ``measured`` is not in the line."""
    match = _LINE.fullmatch(line.rstrip("\r\n"))
    if match is None or "\r" in match[0]:
        return None  # a log may hold anything: a progress bar behind a verdict's words is no verdict
    falsifier, outcome, run, text = match.groups()
    return Verdict(falsifier, Outcome[outcome], text or "", run=run)
