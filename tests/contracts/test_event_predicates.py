"""A predicate over events holds, fails, or is unknown where nothing was looked at; its control is seen failing."""

from __future__ import annotations

import json
from collections.abc import Callable
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


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("comparison", ["<", "<=", "=", "!=", ">=", ">"])
@pytest.mark.parametrize("quantifier", ["every", "some", "none", "last"])
def test_what_is_no_finite_number_counts_against_the_claim(quantifier: str, comparison: str, value: Any) -> None:
    check = predicate(quantifier=quantifier, comparison=comparison)
    assert judge_events(check, [step(value)]).passed is False


def test_a_loss_of_minus_infinity_is_no_loss() -> None:
    contracts = load_contracts()
    (found,) = check_run(contracts, [step(4, loss="-inf")], kind="distill", only=["F-EVENTS-LOSS-001"])
    assert found.verdict.outcome is Outcome.FAIL


@pytest.mark.parametrize("value", [None, [4], {"rows": 4}])
def test_two_fields_that_hold_nothing_comparable_are_not_equal_but_unknown(value: Any) -> None:
    check = predicate(value=None, other="denominator", comparison="=")
    assert judge_events(check, [step(value, denominator=value)]).passed is None


def test_true_is_not_the_number_one() -> None:
    assert judge_events(predicate(where={"final": 1}), [step(4, final=True)]).passed is None
    assert judge_events(predicate(where={"final": True}), [step(4, final=1)]).passed is None
    assert judge_events(predicate(where={"final": 1}), [step(4, final=1.0)]).passed is True
    assert judge_events(predicate(comparison="=", value=1), [step(True)]).passed is None


def test_text_of_a_run_stays_on_one_line_and_steers_no_terminal() -> None:
    check = predicate(field="model", value="twin", comparison="=")
    found = judge_events(check, [step(4, model="a\nF-PLANTED-001 PASS\x1b[2K")])
    assert found.passed is False
    assert found.text.isprintable()


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
        ('comparison: ">"\n      value: 0', 'comparison: "="\n      value: nan', "nothing compares with nan"),
        ("field: rows", 'field: "rows\\n"', "falsifiers[0].check.field = 'rows\\n'"),
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


def _log(run: Path, change: Callable[[list[str]], list[str]]) -> Path:
    events = run / "events.jsonl"
    events.write_text("".join(change(events.read_text().splitlines(keepends=True))))
    return run


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [*lines[:3], '{"seq": 3, "kind": "step", "loss": nan}\n', *lines[3:]], "line 4 is no event"),
        (lambda lines: [*lines[:3], lines[3].replace("distill-", "teacher-"), *lines[4:]], "is an event of teacher-"),
        (lambda lines: lines[:-1], "the run has not ended"),
        (lambda lines: [*lines[:-1], lines[-1][:20]], "the run has not ended"),
    ],
    ids=["a line that is no event", "an event of another run", "no end", "a torn end"],
)
def test_of_a_log_that_is_not_whole_nothing_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[list[str]], list[str]], said: str
) -> None:
    run = _log(planted_run(tmp_path), change)
    assert main(["contracts", "check", "--run", str(run), "F-EVENTS-LOSS-001"]) == ExitCode.UNKNOWN
    assert said in capsys.readouterr().out


def test_what_fails_in_a_log_that_is_not_whole_fails(tmp_path: Path) -> None:
    run = _log(
        planted_run(tmp_path), lambda lines: [line.replace('"loss": 3.0', '"loss": "nan"') for line in lines[:-1]]
    )
    assert main(["contracts", "check", "--run", str(run), "F-EVENTS-LOSS-001"]) == ExitCode.FAIL


@pytest.mark.parametrize("name", ["F-KD-ROWS-001", "kd-mathematics"])
def test_what_cannot_be_judged_on_a_run_is_refused_not_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = str(planted_run(tmp_path))
    assert main(["contracts", "check", "--run", run, "F-EVENTS-END-001", name]) == ExitCode.REFUSED
    assert f"next: latentforge contracts check {name}" in capsys.readouterr().err
