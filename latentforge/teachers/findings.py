"""What a check of a teacher found: a line a step, four capabilities, figures; and the exit code that follows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from latentforge.errors import LatentForgeError
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.protocol import Capability
from latentforge.verdicts.exitcode import ExitCode

State = Literal["pass", "warn", "fail", "skip"]
CAPABILITIES: tuple[Capability, ...] = get_args(Capability)


@dataclass(frozen=True)
class Finding:
    """One step of a check: what was seen, and what to type where it failed; ``kind`` is that of the failure."""

    step: str
    state: State
    said: str
    next: str | None = None
    kind: str | None = None
    code: ExitCode = ExitCode.PASS

    @classmethod
    def of(cls, step: str, error: LatentForgeError, *, next: str | None = None) -> Finding:
        """A step that failed. What may pass by itself is a failed check all the same, so it ends with 1."""
        code = error.code if error.code in (ExitCode.REFUSED, ExitCode.TRANSPORT) else ExitCode.FAIL
        kind = error.kind if isinstance(error, TeacherFailure) else None
        return cls(step, "fail", str(error), next or error.next, kind, code)


@dataclass(frozen=True)
class Ability:
    """One capability: whether the backend declares it, and what asking showed (None: not asked)."""

    name: Capability
    declared: bool
    probed: bool | None
    said: str = ""


@dataclass
class Report:
    """All that a check found, in the order in which it was asked."""

    teacher: str
    backend: str
    findings: list[Finding] = field(default_factory=list)
    abilities: list[Ability] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, step: str, state: State, said: str, *, next: str | None = None) -> None:
        """One more step."""
        code = ExitCode.FAIL if state == "fail" else ExitCode.PASS
        self.findings.append(Finding(step, state, said, next, code=code))

    @property
    def code(self) -> ExitCode:
        """0 where nothing failed, else that of the first failure: what came after it follows from it."""
        return next((one.code for one in self.findings if one.state == "fail"), ExitCode.PASS)

    @property
    def kind(self) -> str | None:
        """The kind of the first failure, None where there is none."""
        return next((one.kind for one in self.findings if one.state == "fail"), None)

    def as_json(self) -> dict[str, Any]:
        """The report for programs."""
        return {
            "teacher": self.teacher,
            "backend": self.backend,
            "ok": self.code == ExitCode.PASS,
            "kind": self.kind,
            "exit_code": int(self.code),
            "steps": [
                {"step": one.step, "state": one.state, "said": one.said, "next": one.next, "kind": one.kind}
                for one in self.findings
            ],
            "capabilities": {
                one.name: {"declared": one.declared, "probed": one.probed, "said": one.said} for one in self.abilities
            },
            "figures": self.figures,
        }

    def lines(self) -> list[str]:
        """The report for people: aligned, every failure with what to type."""
        wide = max((len(one.step) for one in self.findings), default=0)
        shown = [f"teacher {self.teacher}  ({self.backend})", ""]
        for one in self.findings:
            shown.append(f"  {one.step:<{wide}}  {one.state}  {one.said}")
            if one.next and one.state in ("fail", "warn"):
                shown += [f"  {'':<{wide}}        next: {line}" for line in one.next.splitlines()]
        if self.abilities:
            shown += ["", "  capability  declared  probed"]
            shown += [
                f"  {one.name:<10}  {_yes(one.declared):<8}  {_yes(one.probed)}{f'  {one.said}' if one.said else ''}"
                for one in self.abilities
            ]
        return shown


def _yes(value: bool | None) -> str:
    return "not asked" if value is None else "yes" if value else "no"
