"""The sentence above a report says what the run's own events say, and no more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from latentforge.evidence.reading import read_run
from latentforge.report.telling import headline, sentence, state
from latentforge.verdicts import ExitCode, Outcome

from .planted import distilled


def test_a_run_that_passed_is_told_with_its_loss_its_kl_and_its_checks(runs: Path) -> None:
    record = read_run(distilled(runs))
    assert state(record) == "pass"
    assert sentence(record) == (
        "In 60 steps the student of 229,760 parameters lowered its held-out loss from 7.600 to 5.600 (nats a token); "
        "its KL to the teacher is 0.07000, that of its twin without a teacher 0.1800. All 2 checks pass."
    )


def test_a_canary_is_not_told_as_the_student_for_whose_training_it_stands(runs: Path) -> None:
    record = read_run(distilled(runs))
    assert headline(record) == "distill: a student"
    assert record.identity is not None
    canary = replace(record.identity, inputs={**record.identity.inputs, "stands_for": "sha256:" + "d" * 64})
    assert headline(replace(record, identity=canary)) == "distill: the canary of a student"


def test_a_run_that_failed_names_the_check_that_failed(runs: Path) -> None:
    verdicts = [
        ("F-BATCH-ROWS-001", Outcome.PASS, "all rows"),
        ("F-DISTILL-SMOKE-002", Outcome.FAIL, "val_kl 0.2 >= 0.18"),
        ("F-KERNEL-NOJIT-001", Outcome.UNKNOWN, "not counted"),
    ]
    record = read_run(distilled(runs, verdicts=verdicts, code=ExitCode.FAIL))
    assert state(record) == "fail"
    told = "1 of 3 checks pass, 1 fails, 1 is not known: F-DISTILL-SMOKE-002, val_kl 0.2 >= 0.18."
    assert sentence(record).endswith(told)


def test_a_log_that_stops_is_told_as_one_that_stops_with_what_its_host_recorded(runs: Path) -> None:
    run = distilled(runs, stops_at=31)
    (run / "exit.json").write_text(json.dumps({"code": None, "signal": 9, "outcome": "crashed", "oom": True}))
    record = read_run(run)
    assert state(record) == "interrupted"
    assert "The log stops at step 31 of 60 of the student" in sentence(record)
    assert sentence(record).endswith("Its host recorded: crashed, signal 9, out of memory.")
    assert "pass" not in sentence(record)


def test_a_host_that_says_otherwise_than_the_last_event_is_told_before_any_check(runs: Path) -> None:
    run = distilled(runs)
    (run / "exit.json").write_text(json.dumps({"code": None, "signal": 9, "outcome": "crashed"}))
    record = read_run(run)
    assert state(record) == "unknown"
    assert sentence(record).startswith(
        "Its log ends with code 0, but its host says otherwise: how it ended is not known. "
        "Its host recorded: crashed, signal 9."
    )


def test_a_run_without_events_is_told_as_one_of_which_nothing_is_known(runs: Path) -> None:
    run = distilled(runs)
    (run / "events.jsonl").unlink()
    record = read_run(run)
    assert state(record) == "nothing recorded"
    assert sentence(record).startswith("The folder holds no events of this run: what happened is not known.")


def test_a_run_that_was_refused_says_why(runs: Path) -> None:
    record = read_run(distilled(runs, verdicts=[], code=ExitCode.REFUSED, reason="data.rows = 3: too few."))
    assert state(record) == "refused"
    assert sentence(record).startswith("It was refused: data.rows = 3: too few.")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_held_out_loss_that_is_no_number_is_not_called_lower(runs: Path, value: str) -> None:
    run = distilled(runs)
    lines = (run / "events.jsonl").read_text().replace('"value": 5.6,', f'"value": "{value}",')
    (run / "events.jsonl").write_text(lines)
    told = sentence(read_run(run))
    assert "lowered" not in told
    assert ("not a number" if value == "nan" else "∞") in told


def test_a_held_out_loss_that_rose_is_told_as_raised(runs: Path) -> None:
    run = distilled(runs)
    lines = (run / "events.jsonl").read_text().replace('"value": 5.6,', '"value": 9.25,')
    (run / "events.jsonl").write_text(lines)
    assert "raised its held-out loss from 7.600 to 9.250" in sentence(read_run(run))
