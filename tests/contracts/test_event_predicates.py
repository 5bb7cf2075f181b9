"""A predicate over events holds, fails, or is unknown where nothing was looked at; its control is seen failing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latentforge.cli import main
from latentforge.contracts import check_run, load_contracts, overall
from latentforge.contracts.events import judge_events
from latentforge.contracts.schema import EventCheck
from latentforge.errors import RefusedError
from latentforge.events import Event
from latentforge.evidence.checks import planted_run
from latentforge.verdicts import ExitCode, Outcome

GOOD = """\
contract: planted
version: 1
title: a planted contract
description: planted
references: [none]
scope: {profile: any}
falsifiers:
  - id: F-PLANTED-001
    statement: it holds
    prediction: it passes
    check:
      events: latentforge.planted_checks:events
      of: [distill]
      kind: step
      quantifier: every
      field: rows
      comparison: ">"
      value: 0
    control: {name: a step of no row, change: {rows: 0}}
    if_fails: it does not hold
"""


def step(rows: Any, **fields: Any) -> Event:
    return Event(1, 1.0, "", "distill-" + "a" * 20, "step", {"rows": rows, "model": "student", **fields})


def predicate(**fields: Any) -> EventCheck:
    base = {"events": "latentforge.x:y", "of": ["distill"], "kind": "step", "quantifier": "every", "field": "rows"}
    return EventCheck.model_validate({**base, "comparison": ">", "value": 3, **fields})


@pytest.mark.parametrize(
    ("quantifier", "held"),
    [("every", (True, False, False)), ("some", (True, True, False)), ("none", (False, False, True))],
)
def test_quantifiers_over_all_some_and_no_event_that_holds(quantifier: str, held: tuple[bool, ...]) -> None:
    check = predicate(quantifier=quantifier)
    found = [judge_events(check, events).passed for events in ([step(4)] * 2, [step(4), step(3)], [step(3), step(2)])]
    assert tuple(found) == held


def test_the_last_event_alone_counts_where_it_is_asked_for() -> None:
    assert judge_events(predicate(quantifier="last"), [step(1), step(4)]).passed is True
    assert judge_events(predicate(quantifier="last"), [step(4), step(1)]).passed is False


@pytest.mark.parametrize(
    "events",
    [[], [step(4, model="twin")], [Event(1, 1.0, "", "r", "metric", {"rows": 4, "model": "student"})]],
    ids=["no event", "another model", "another kind"],
)
@pytest.mark.parametrize("quantifier", ["every", "some", "none", "last"])
def test_where_nothing_is_looked_at_nothing_is_known(quantifier: str, events: list[Event]) -> None:
    found = judge_events(predicate(quantifier=quantifier, where={"model": "student"}), events)
    assert found.passed is None
    assert "nothing was looked at" in found.text


@pytest.mark.parametrize("value", ["many", True, None, [4]])
def test_an_event_that_does_not_state_a_number_is_unknown_not_passed(value: Any) -> None:
    assert judge_events(predicate(), [step(4), step(value)]).passed is None
    assert judge_events(predicate(field="rowz"), [step(4)]).passed is None
    assert judge_events(predicate(value=None, other="denominator"), [step(4)]).passed is None


@pytest.mark.parametrize("comparison", ["<", "<=", "=", "!=", ">=", ">"])
def test_what_is_not_a_number_compares_with_nothing(comparison: str) -> None:
    assert judge_events(predicate(comparison=comparison), [step("nan")]).passed is False


def test_a_field_is_compared_with_another_of_the_same_event() -> None:
    check = predicate(value=None, other="denominator", comparison="=")
    assert judge_events(check, [step(4, denominator=4), step(5, denominator=5)]).passed is True
    found = judge_events(check, [step(4, denominator=5)])
    assert (found.passed, found.text) == (
        False,
        "rows = denominator in 0 of 1 step events; seq 1: rows 4, denominator 5",
    )


@pytest.mark.parametrize("quantifier", ["every", "some", "none", "last"])
def test_a_planted_change_is_seen_whatever_the_quantifier(quantifier: str) -> None:
    events = [step(1), step(1)] if quantifier == "none" else [step(4), step(4)]
    check = predicate(quantifier=quantifier)
    assert judge_events(check, events).passed is True
    assert judge_events(check, events, change={"rows": 4 if quantifier == "none" else 0}).passed is False
    assert judge_events(check, events).passed is True  # nothing of the run's own events was changed


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("quantifier:", "quantifer:", "15: unknown key 'quantifer' in falsifiers[0].check; did you mean 'quantifier'?"),
        ("quantifier: every", "quantifier: each", "falsifiers[0].check.quantifier = 'each'"),
        ("kind: step", "kind: steps", "falsifiers[0].check.kind = 'steps'"),
        ("value: 0", "value: 0\n      other: x", "either value or other"),
        ("      value: 0\n", "", "either value or other"),
        ("value: 0", "value: many", "'many' is no number"),
        ("change: {rows: 0}", "with: {mutant: x}", "it has change, and nothing else"),
        ("change: {rows: 0}", "change: {}", "falsifiers[0].control.change"),
        ("of: [distill]", "of: []", "falsifiers[0].check.of"),
    ],
)
def test_a_predicate_is_read_as_strictly_as_the_rest(tmp_path: Path, right: str, wrong: str, said: str) -> None:
    assert right in GOOD
    (tmp_path / "planted.yaml").write_text(GOOD.replace(right, wrong))
    with pytest.raises(RefusedError) as refused:
        load_contracts(tmp_path)
    assert said in str(refused.value)


def test_a_run_is_judged_by_its_own_events_and_profile(tmp_path: Path) -> None:
    (tmp_path / "planted.yaml").write_text(GOOD)
    contracts = load_contracts(tmp_path)
    (found,) = check_run(contracts, [step(4), step(5)], kind="distill", profile="smoke")
    assert (found.verdict.outcome, found.control is not None and found.control.passed) == (Outcome.PASS, False)
    (failed,) = check_run(contracts, [step(0)], kind="distill", profile="smoke")
    assert failed.verdict.outcome is Outcome.FAIL
    (other,) = check_run(contracts, [step(0)], kind="data", profile="smoke")
    assert (other.counts, other.verdict.text) == (False, "about distill runs")
    (tmp_path / "planted.yaml").write_text(GOOD.replace("profile: any", "profile: full"))
    (small,) = check_run(load_contracts(tmp_path), [step(0)], kind="distill", profile="smoke")
    assert (small.counts, small.verdict.text) == (False, "holds for full runs")
    assert overall([small, other]) is ExitCode.UNKNOWN


def test_the_command_judges_a_run_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = planted_run(tmp_path)
    assert main(["contracts", "check", "--run", str(run), "F-EVENTS-END-001", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["run"] == run.name
    (one,) = report["falsifiers"]
    assert (one["outcome"], one["control"]["seen_failing"]) == ("pass", True)
    # This run's steps say no denominator: unknown, and the exit code with it.
    assert main(["contracts", "check", "--run", str(run), "run-events"]) == ExitCode.UNKNOWN
    assert "2 of 2 step events do not state rows and denominator" in capsys.readouterr().out
