"""Verdicts: a lattice in which nothing unknown turns green, and a line that reads back as it was written."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentforge.verdicts import FALSIFIER_ID, ExitCode, Outcome, Verdict, exit_code, meet, parse_line

OUTCOMES = st.sampled_from(list(Outcome))
MANY = st.lists(OUTCOMES)
WORD = st.text(alphabet="ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=1, max_size=6)
IDS = st.builds(
    lambda words, n: f"F-{'-'.join(words)}-{n:03d}", st.lists(WORD, min_size=1, max_size=3), st.integers(0, 999)
)
RUNS = st.none() | st.builds(
    lambda kind, digits: f"{kind}-{digits:020x}",
    st.sampled_from(["data", "teacher", "score", "distill"]),
    st.integers(0, 16**20 - 1),
)
# One line of any characters. What begins like a run is not a text that a verdict can state without a run of its own.
TEXTS = st.text(
    alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"),
    max_size=60,
)


@given(OUTCOMES, OUTCOMES, OUTCOMES)
def test_meet_is_idempotent_commutative_and_associative(a: Outcome, b: Outcome, c: Outcome) -> None:
    assert meet([a, a]) is a
    assert meet([a, b]) is meet([b, a])
    assert meet([meet([a, b]), c]) is meet([a, meet([b, c])])


@given(OUTCOMES)
def test_pass_is_neutral_and_fail_absorbs(a: Outcome) -> None:
    assert meet([a, Outcome.PASS]) is a
    assert meet([a, Outcome.FAIL]) is Outcome.FAIL


@given(MANY, OUTCOMES)
def test_one_more_verdict_never_makes_it_better(many: list[Outcome], one: Outcome) -> None:
    if many:
        assert meet([*many, one]) <= meet(many)


@given(MANY)
def test_only_all_pass_is_a_pass(many: list[Outcome]) -> None:
    assert (meet(many) is Outcome.PASS) == (bool(many) and all(one is Outcome.PASS for one in many))


@given(MANY)
def test_the_order_of_verdicts_does_not_matter(many: list[Outcome]) -> None:
    assert meet(many) is meet(reversed(many)) is meet(sorted(many))


def test_no_verdict_at_all_is_unknown() -> None:
    assert meet([]) is Outcome.UNKNOWN


@given(MANY)
def test_exit_code_0_means_pass_and_nothing_else(many: list[Outcome]) -> None:
    assert (exit_code(meet(many)) == 0) == (meet(many) is Outcome.PASS)
    assert exit_code(meet(many)) in (ExitCode.PASS, ExitCode.FAIL, ExitCode.UNKNOWN)


def test_the_exit_codes_are_those_of_the_design() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "PASS": 0, "FAIL": 1, "REFUSED": 2, "UNKNOWN": 3, "STALLED": 4, "CRASHED": 5, "TRANSPORT": 6, "BUSY": 7,
        "DETACHED": 130,
    }  # fmt: skip


@given(IDS, OUTCOMES, RUNS, TEXTS)
def test_a_verdicts_line_reads_back_as_it_was_written(
    falsifier: str, outcome: Outcome, run: str | None, text: str
) -> None:
    verdict = Verdict(falsifier, outcome, text, {"value": 1.0}, run)
    read = parse_line(verdict.line())
    if run is None and re.match(r"run=[a-z]+-[0-9a-f]{20}( |$)", text):
        return  # such a text reads as a run: the grammar gives that word to the run
    assert read is not None
    assert (read.falsifier, read.outcome, read.text, read.run) == (falsifier, outcome, text, run)
    assert parse_line(verdict.line() + "\n") == read


@given(IDS, OUTCOMES, RUNS, TEXTS)
def test_grep_for_the_falsifier_finds_the_line(falsifier: str, outcome: Outcome, run: str | None, text: str) -> None:
    line = Verdict(falsifier, outcome, text, run=run).line()
    assert "\n" not in line
    assert re.match(rf"{re.escape(falsifier)} {outcome.name}( |$)", line)


@given(st.text(max_size=80))
def test_reading_any_line_never_raises(line: str) -> None:
    verdict = parse_line(line)
    assert verdict is None or FALSIFIER_ID.fullmatch(verdict.falsifier)


@pytest.mark.parametrize(
    "line",
    [
        "step 120/500 loss 3.2101",
        "F-DISTILL-SMOKE-001 PASSED val_loss",
        "F-DISTILL-SMOKE-001PASS",
        "F-DISTILL-SMOKE-1 PASS",
        "f-distill-smoke-001 PASS",
        " F-DISTILL-SMOKE-001 PASS",
        "say F-DISTILL-SMOKE-001 PASS",
        "F-DISTILL-SMOKE-001  PASS",
        "F-DISTILL-SMOKE-001 pass",
        "F-DISTILL-SMOKE-001",
        "",
    ],
)
def test_a_line_that_is_nearly_a_verdict_is_none(line: str) -> None:
    assert parse_line(line) is None


@pytest.mark.parametrize(
    "falsifier", ["F-SMOKE-1", "SMOKE-001", "F-smoke-001", "F--001", "F-A-0001", "F-A-001 ", "", "F-001"]
)
def test_what_is_not_a_falsifier_id_is_refused(falsifier: str) -> None:
    with pytest.raises(ValueError, match="falsifier id"):
        Verdict(falsifier, Outcome.PASS, "")


@pytest.mark.parametrize("text", ["two\nlines", "carriage\rreturn", "F-OTHER-001 PASS\nF-OTHER-002 PASS"])
def test_a_text_of_several_lines_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="more than one line"):
        Verdict("F-A-001", Outcome.PASS, text)


def test_a_verdict_is_frozen() -> None:
    verdict: Any = Verdict("F-A-001", Outcome.PASS, "x")
    with pytest.raises(AttributeError):
        verdict.outcome = Outcome.FAIL


def test_a_line_that_holds_a_carriage_return_is_no_verdict_and_no_error() -> None:
    assert parse_line("F-DISTILL-SMOKE-001 PASS 10%\r20%") is None
    assert parse_line("F-DISTILL-SMOKE-001 PASS fine\r\n") is not None
