"""Running falsifiers: PASS only where the check passed *and* its planted control was seen to fail."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from latentforge.contracts.events import judge_events
from latentforge.contracts.finding import Finding
from latentforge.contracts.load import ContractSet
from latentforge.contracts.machine import Machine, this_machine
from latentforge.contracts.preconditions import judge_precondition
from latentforge.contracts.schema import Contract, EventCheck, Falsifier, Precondition
from latentforge.errors import RefusedError
from latentforge.events import Event
from latentforge.verdicts import ExitCode, Outcome, Verdict, exit_code, meet

Check = Callable[..., Any]
_WORDS = {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}
"""How events write the numbers that JSON lacks."""


class UndecidedError(Exception):
    """A check that could not be found or run: its reason becomes an UNKNOWN verdict."""


@dataclass(frozen=True)
class Checked:
    """One falsifier that was looked at. ``counts`` is False outside its scope and where it is superseded."""

    contract: Contract
    falsifier: Falsifier
    verdict: Verdict
    control: Finding | None
    seconds: float
    counts: bool = True

    def as_json(self) -> dict[str, Any]:
        """The result as JSON-able data."""
        control = self.control
        return {
            "contract": self.contract.contract,
            "falsifier": self.falsifier.id,
            "outcome": self.verdict.outcome.name.lower(),
            "text": self.verdict.text,
            "measured": self.verdict.measured,
            "control": {
                "name": self.falsifier.control.name,
                "seen_failing": None if control is None else control.passed is False,
                "text": None if control is None else control.text,
                "measured": None if control is None else control.measured,
            },
            "seconds": round(self.seconds, 3),
            "counts": self.counts,
        }


def resolve_check(reference: str) -> Check:
    """The function behind ``module:function``; UndecidedError with the reason where there is none."""
    module_name, _, function_name = reference.partition(":")
    try:
        with _silence(), _staying():
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UndecidedError(f"check not found: there is no module {error.name}") from error
        raise UndecidedError(f"check cannot be imported: it needs {error.name}, which is not installed") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a module that ends the process would end this with its own code
        raise UndecidedError(f"check cannot be imported: {_shown(error)}") from error
    function = getattr(module, function_name, None)
    if function is None:
        raise UndecidedError(f"check not found: {module_name} has no {function_name}")
    if not callable(function):
        raise UndecidedError(f"check not found: {reference} is not a function")
    return function  # type: ignore[no-any-return]


def call_check(check: Check, arguments: dict[str, Any]) -> Finding:
    """Call a check with its output kept off the terminal; UndecidedError where it raises or answers nothing."""
    finding = _called(check, arguments)
    if not isinstance(finding, Finding):
        raise UndecidedError(f"the check returned {type(finding).__name__}, not a Finding")
    try:
        measured = json.loads(json.dumps(finding.measured), parse_constant=_WORDS.__getitem__)
    except (TypeError, ValueError, RecursionError) as error:
        raise UndecidedError(f"what the check measured is no JSON: {_shown(error)}") from error
    if not isinstance(measured, dict):
        raise UndecidedError(f"what the check measured is {type(measured).__name__}, not values by name")
    return replace(finding, measured=measured)


def call_events(function: Callable[..., Any], arguments: dict[str, Any]) -> list[Event]:
    """The events that a predicate is about; UndecidedError where they cannot be made, or are none."""
    events = _called(function, arguments)
    if not isinstance(events, list) or not all(isinstance(event, Event) for event in events):
        raise UndecidedError(f"the events of the check are {type(events).__name__}, not a list of events")
    return events


def _called(check: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        inspect.signature(check).bind(**arguments)
    except (TypeError, ValueError) as error:  # ValueError: a function of C that says nothing of its arguments
        raise UndecidedError(f"the check does not take these arguments: {error}") from error
    try:
        with _silence(), _staying():
            return check(**arguments)
    except ModuleNotFoundError as error:
        raise UndecidedError(f"the check cannot run: it needs {error.name}, which is not installed") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UndecidedError(f"the check raised {_shown(error)}") from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What a check prints stays out of the table, and out of the JSON."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield


@contextlib.contextmanager
def _staying() -> Iterator[None]:
    """A check that leaves this process at once would take the verdicts along, with an exit code of its own choice.

    Processes that it forks leave as they like.
    """
    here, leave = os.getpid(), os._exit

    def stay(status: int) -> NoReturn:
        if os.getpid() != here:
            leave(status)
        raise SystemExit(f"os._exit({status!r})")

    os._exit = stay
    try:
        yield
    finally:
        os._exit = leave


def check_falsifier(
    contract: Contract,
    falsifier: Falsifier,
    *,
    stage: Callable[[str], None] = lambda stage: None,
    events: Sequence[Event] | None = None,
) -> Checked:
    """Run a falsifier's check, then its control; ``stage`` is told ``check`` and ``control`` as each begins.

    A predicate over events is judged on ``events`` where they are given, else on those that its function makes.
    """
    began = time.monotonic()

    def checked(outcome: Outcome, text: str, measured: dict[str, Any], control: Finding | None = None) -> Checked:
        verdict = Verdict(falsifier.id, outcome, _one_line(text), measured)
        return Checked(contract, falsifier, verdict, control, time.monotonic() - began)

    try:
        stage("check")
        run = _prepared(falsifier, events)
        finding = run(False)
    except UndecidedError as error:
        return checked(Outcome.UNKNOWN, str(error), {})
    if finding.passed is None:
        return checked(Outcome.UNKNOWN, finding.text, finding.measured)
    if finding.passed is False:
        return checked(Outcome.FAIL, finding.text, finding.measured)
    name = falsifier.control.name
    try:
        stage("control")
        control = run(True)
    except UndecidedError as error:
        return checked(Outcome.UNKNOWN, f"{finding.text}; control {name}: {error}", finding.measured)
    if control.passed is None:
        reason = f"{finding.text}; control {name} was not decided: {control.text}"
        return checked(Outcome.UNKNOWN, reason, finding.measured, control)
    if control.passed is True:
        return checked(
            Outcome.FAIL, f"control not caught: {name} passes the check ({control.text})", finding.measured, control
        )
    return checked(Outcome.PASS, finding.text, finding.measured, control)


def _prepared(falsifier: Falsifier, events: Sequence[Event] | None) -> Callable[[bool], Finding]:
    """The check as a function of whether its control is planted; UndecidedError where it is not there."""
    predicate = falsifier.check
    if isinstance(predicate, EventCheck):
        if events is None:
            events = call_events(resolve_check(predicate.events), falsifier.arguments)
        seen = events
        return lambda planted: judge_events(predicate, seen, change=falsifier.control.change if planted else None)
    check = resolve_check(falsifier.function)
    if isinstance(predicate, Precondition):
        given = (falsifier.arguments, falsifier.control_arguments)
        return lambda planted: call_check(
            lambda: judge_precondition(predicate, lambda value: check(value, **given[planted])), {}
        )
    return lambda planted: call_check(check, falsifier.control_arguments if planted else falsifier.arguments)


def check_run(
    contracts: ContractSet,
    events: Sequence[Event],
    *,
    kind: str,
    profile: str | None = None,
    only: Iterable[str] = (),
    doubts: Sequence[str] = (),
) -> list[Checked]:
    """Judge every predicate over events (or the named ones) on the events of a run, with its control planted into them.

    A predicate that is not about runs of this ``kind`` or ``profile`` does not count. ``doubts`` are reasons for which
    the events may not be all that the run wrote: with one, what would pass is UNKNOWN. RefusedError where ``only``
    names what is no predicate over events: what was asked for is not passed over.
    """
    wanted, results = set(only), []
    for _, falsifier in contracts.falsifiers():
        if falsifier.id in wanted and not isinstance(falsifier.check, EventCheck):
            raise RefusedError(
                f"{falsifier.id} is no predicate over events: it is not judged on a run",
                next=f"latentforge contracts check {falsifier.id}",
            )
    for contract, falsifier in contracts.falsifiers():
        predicate = falsifier.check
        if not isinstance(predicate, EventCheck) or (wanted and falsifier.id not in wanted):
            continue
        scope = contract.scope_of(falsifier)
        successor = contracts.superseded_by(falsifier.id)
        reason = None if successor is None else f"superseded by {successor}"
        if reason is None and kind not in predicate.of:
            reason = f"about {' and '.join(predicate.of)} runs"
        if reason is None and profile is not None and scope.profile not in ("any", profile):
            reason = f"holds for {scope.profile} runs"
        if reason is not None:
            verdict = Verdict(falsifier.id, Outcome.UNKNOWN, reason)
            results.append(Checked(contract, falsifier, verdict, None, 0.0, counts=False))
        else:
            found = check_falsifier(contract, falsifier, events=events)
            results.append(_doubted(found, doubts[0]) if doubts else found)
    return results


def _doubted(found: Checked, doubt: str) -> Checked:
    if found.verdict.outcome is not Outcome.PASS:
        return found
    text = f"{found.verdict.text}; but {doubt}"
    return replace(found, verdict=Verdict(found.falsifier.id, Outcome.UNKNOWN, text, found.verdict.measured))


def check_contract(
    contract: Contract,
    contracts: ContractSet,
    *,
    only: Iterable[str] = (),
    machine: Machine | None = None,
    begin: Callable[[Falsifier], Callable[[str], None]] = lambda falsifier: lambda stage: None,
    end: Callable[[Checked], None] = lambda checked: None,
) -> list[Checked]:
    """Run a contract's falsifiers (or the named ones), telling ``begin`` and ``end`` as each starts and finishes."""
    machine = machine or this_machine()
    wanted = set(only)
    results = []
    for falsifier in contract.falsifiers:
        if wanted and falsifier.id not in wanted:
            continue
        successor = contracts.superseded_by(falsifier.id)
        unmet = contract.scope_of(falsifier).unmet(arch=machine.arch, gpus=machine.gpus)
        if successor is not None:
            verdict = Verdict(falsifier.id, Outcome.UNKNOWN, f"superseded by {successor}")
            result = Checked(contract, falsifier, verdict, None, 0.0, counts=False)
        elif unmet is not None:
            verdict = Verdict(falsifier.id, Outcome.UNKNOWN, f"{unmet}; not required on this machine")
            result = Checked(contract, falsifier, verdict, None, 0.0, counts=False)
        else:
            result = check_falsifier(contract, falsifier, stage=begin(falsifier))
        end(result)
        results.append(result)
    return results


def overall(results: Iterable[Checked]) -> ExitCode:
    """The exit code of a check: 0 all pass, 1 one fails, 3 one is unknown where it counts, or nothing was checked."""
    return exit_code(meet(result.verdict.outcome for result in results if result.counts))


def summary(results: list[Checked]) -> str:
    """``37 falsifiers: 36 pass, 0 fail, 1 unknown (needs a GPU; not required on this machine)``."""
    count = {outcome: sum(r.verdict.outcome is outcome for r in results) for outcome in Outcome}
    reasons = sorted({result.verdict.text for result in results if not result.counts})
    noun = "falsifier" if len(results) == 1 else "falsifiers"
    line = (
        f"{len(results)} {noun}: {count[Outcome.PASS]} pass, {count[Outcome.FAIL]} fail, "
        f"{count[Outcome.UNKNOWN]} unknown"
    )
    return f"{line} ({', '.join(reasons)})" if reasons else line


def _shown(error: BaseException) -> str:
    text = _one_line(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())
