"""Faults of checks and verdicts: what must not turn green whatever a check does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from latentforge.contracts import Checked, Finding, check_contract, load_contracts, overall, runner
from latentforge.contracts.machine import Machine
from latentforge.verdicts import ExitCode, Outcome, parse_line

from ..contracts.test_runner import checked, law_of_ends
from .contract_mutants import GOOD
from .frame import mutant

RUNNER = "the runner of checks: not a pass"
MODULE = "latentforge.contracts.checks"


def honest(*, mutant: str | None = None) -> Finding:
    """A check that can fail: two is not one."""
    return Finding(mutant is None, "one is one" if mutant is None else "two is one")


def _judged(folder: Path, check: Callable[..., Any] | None, scope: str = "any") -> list[Checked]:
    """The planted contract with this function behind it."""
    (folder / "planted.yaml").write_text(GOOD.replace("device: any", f"device: {scope}"))
    module = ModuleType(MODULE)
    if check is not None:
        module.planted = check  # type: ignore[attr-defined]
    contracts = load_contracts(folder)
    with mock.patch.dict(sys.modules, {MODULE: module}):
        return [one for each in contracts for one in check_contract(each, contracts, machine=Machine("x86_64", ()))]


def _check(name: str, wrong: Callable[..., Any] | None, *, how: str) -> None:
    @mutant("verdicts", name, how=how, by=RUNNER)
    def _(folder: Path, planted: bool) -> str | None:
        (found,) = _judged(folder, wrong if planted else honest)
        if found.verdict.outcome is Outcome.PASS or overall([found]) is ExitCode.PASS:
            return None
        return found.verdict.line()


def _raising(when: str | None) -> Callable[..., Finding]:
    def check(*, mutant: str | None = None) -> Finding:
        if mutant == when:
            raise RuntimeError("broken")
        return honest(mutant=mutant)

    return check


def _one(*, mutant: str | None = None) -> Any:
    return Finding(1 if mutant is None else 0, "one is one")  # type: ignore[arg-type]


_check("removed check", None, how="the function that the contract names is not there")
_check(
    "emptied check", lambda *, mutant=None: Finding(True, "fine"), how="a check whose body is gone: it always passes"
)
_check("check that returns 1", _one, how="`Finding(1, …)` in place of `Finding(True, …)`")
_check("check that returns True", lambda *, mutant=None: True, how="no Finding at all")
_check("check that raises", _raising(None), how="the check ends with an error")
_check("control that raises", _raising("two"), how="the check passes, its control ends with an error")
_check("check that leaves with 0", lambda *, mutant=None: sys.exit(0), how="`sys.exit(0)` inside the check")
_check("check without an answer", lambda *, mutant=None: Finding(None, "?"), how="the check cannot decide")
_check(
    "control without an answer",
    lambda *, mutant=None: Finding(True if mutant is None else None, "?"),
    how="the check passes, its control cannot decide",
)
_check("check that takes no control", lambda: Finding(True, "fine"), how="the planted argument is not looked at")


@mutant("verdicts", "nothing in scope", how="every claim needs a GPU that is not there", by="the exit code: 3, not 0")
def _(folder: Path, planted: bool) -> str | None:
    code = overall(_judged(folder, honest, "cuda" if planted else "any"))
    return None if code is ExitCode.PASS else f"exit code {int(code)}"


@mutant("verdicts", "verdict line reworded", how="`PASSED` in place of `PASS`", by="the reader of verdict lines")
def _(folder: Path, planted: bool) -> str | None:
    line = f"F-PLANTED-001 {'PASSED' if planted else 'PASS'} val_loss 3.0 < 4.9"
    return None if parse_line(line) is not None else f"no verdict: {line}"


@mutant(
    "verdicts",
    "best of several",
    how="the runner joins verdicts by the best one, not the worst",
    by="the law that a check ends as its worst part does (tests/contracts/test_runner.py)",
)
def _(folder: Path, planted: bool) -> str | None:
    def best(found: Iterable[Outcome]) -> Outcome:
        return max(found, default=Outcome.UNKNOWN)

    with mock.patch.object(runner, "meet", best if planted else runner.meet):
        try:
            law_of_ends(*(checked(outcome, counts=True) for outcome in (Outcome.PASS, Outcome.FAIL)))
        except AssertionError as error:
            return f"no law: {' '.join(str(error).split())}"
    return None
