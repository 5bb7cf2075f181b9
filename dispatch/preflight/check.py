"""The words of a preflight: a check, what became of it, and the report that holds them all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from latentforge.verdicts import ExitCode

Outcome = Literal["pass", "warn", "fail", "unknown", "n/a"]


class Found(NamedTuple):
    """What a judgement came to: the outcome, what was measured, and what to do about it (None where nothing is)."""

    outcome: Outcome
    measured: str
    remedy: str | None = None


def passed(measured: str) -> Found:
    """The rule holds."""
    return Found("pass", measured)


def warned(measured: str, remedy: str) -> Found:
    """A run may go on, and somebody should look."""
    return Found("warn", measured, remedy)


def failed(measured: str, remedy: str) -> Found:
    """The rule is broken."""
    return Found("fail", measured, remedy)


def unknown(why: str, remedy: str | None = None) -> Found:
    """The host did not say; that is never taken for a pass."""
    return Found("unknown", why, remedy)


def not_applicable(why: str) -> Found:
    """The rule is about something that is not there."""
    return Found("n/a", why)


@dataclass(frozen=True)
class Check:
    """One check of one host. ``gate`` says that its failure stops a launch."""

    id: str
    title: str
    outcome: Outcome
    measured: str
    rule: str
    remedy: str | None = None
    seconds: float | None = None
    gate: bool = False
    waived: str | None = None
    """Why a failure is let through, in the operator's words; it is kept with the run."""

    @property
    def stops(self) -> bool:
        """Whether a launch is refused because of it."""
        return self.gate and self.outcome == "fail" and self.waived is None

    def as_json(self) -> dict[str, Any]:
        """The check for programs."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Report:
    """Every check of one host, in the order of the table."""

    host: str
    gb10: bool
    checks: tuple[Check, ...]

    def __getitem__(self, id: str) -> Check:
        return self._by_id[id]

    @cached_property
    def _by_id(self) -> dict[str, Check]:
        return {check.id: check for check in self.checks}

    @property
    def stopping(self) -> tuple[Check, ...]:
        """The checks whose failure stops a launch."""
        return tuple(check for check in self.checks if check.stops)

    @property
    def counts(self) -> dict[str, int]:
        """How many checks came to each outcome."""
        return dict(Counter(check.outcome for check in self.checks))

    @property
    def code(self) -> ExitCode:
        """1 where any check fails, whether or not it stops a launch; unknown is told, and fails nothing."""
        return ExitCode.FAIL if self.counts.get("fail") else ExitCode.PASS

    def counted(self) -> str:
        """``26 pass, 1 warn, 1 unknown``: what applies to this host."""
        counts = self.counts
        return ", ".join(f"{counts[one]} {one}" for one in ("pass", "warn", "fail", "unknown") if counts.get(one))

    def only(self, ids: frozenset[str]) -> Report:
        """The report without the checks that were not asked for."""
        return Report(self.host, self.gb10, tuple(one for one in self.checks if one.id in ids))

    def as_json(self) -> dict[str, Any]:
        """The report for programs."""
        checks = [check.as_json() for check in self.checks]
        return {"host": self.host, "gb10": self.gb10, "counts": self.counts, "checks": checks, "code": int(self.code)}
