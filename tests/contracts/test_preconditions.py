"""A precondition is probed on both sides of its bounds and with what is no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latentforge.contracts import load_contracts
from latentforge.contracts.preconditions import judge_precondition, probes
from latentforge.contracts.schema import Precondition
from latentforge.errors import RefusedError

GOOD = """\
contract: planted
version: 1
title: a planted contract
description: planted
references: [none]
falsifiers:
  - id: F-PLANTED-001
    statement: it is bounded
    prediction: refused outside
    check: {accepts: latentforge.x:takes, type: number, above: 0, at_most: 1}
    control: {name: not looked at, with: {mutant: unchecked}}
    if_fails: it is not bounded
"""


def bounded(**fields: Any) -> Precondition:
    return Precondition.model_validate({"accepts": "latentforge.x:y", "type": "whole", **fields})


def honest(value: Any) -> None:
    if type(value) is not int or not 1 <= value <= 5:
        raise ValueError(value)


def test_both_sides_of_each_bound_are_probed() -> None:
    inside, outside = probes(bounded(at_least=1, at_most=5))
    assert sorted(inside) == [1, 2, 3, 4, 5]
    assert {0, 6, 1.5} <= {value for value in outside if isinstance(value, int | float)}
    inside, outside = probes(bounded(above=0, below=6))
    assert sorted(inside) == [1, 3, 5]
    assert {0, 6} <= {value for value in outside if isinstance(value, int)}


def test_what_one_bound_lets_in_and_the_other_does_not_is_outside() -> None:
    inside, outside = probes(bounded(at_least=1, at_most=1))
    assert inside == [1]
    assert {0, 2} <= {value for value in outside if isinstance(value, int)}
    inside, outside = probes(bounded(type="number", at_least=0, below=1e-3))
    assert {0, 5e-4, 1e-3 - 2**-62} == set(inside) - {5e-324}
    assert {1, -1, 1e-3} <= {value for value in outside if isinstance(value, int | float)}


def test_a_number_is_tried_next_to_its_bound_and_well_away_from_it() -> None:
    check = bounded(type="number", above=0)
    assert probes(check)[0] == [1, 5e-324]

    def least(value: Any) -> None:  # a bound of its own, above the one that is claimed
        if not isinstance(value, int | float) or isinstance(value, bool) or not 1e-6 <= value < float("inf"):
            raise ValueError(value)

    def most(value: Any) -> None:  # takes what is near the bound alone
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1e-3:
            raise ValueError(value)

    assert judge_precondition(check, least).passed is False
    assert judge_precondition(check, most).passed is False


@pytest.mark.parametrize(
    ("takes", "passed"),
    [
        (honest, True),
        (lambda value: None, False),  # takes everything
        (lambda value: honest(None), False),  # takes nothing
        (lambda value: None if value == 6 else honest(value), False),  # one too many
        (lambda value: honest(0 if value == 1 else value), False),  # one too few
        (lambda value: None if value is True else honest(value), False),  # true for 1
        (lambda value: None if value == 1.5 else honest(value), False),  # half of one
    ],
)
def test_a_bound_that_is_not_kept_is_seen(takes: Any, passed: bool) -> None:
    assert judge_precondition(bounded(at_least=1, at_most=5), takes).passed is passed


def test_an_error_that_is_no_refusal_is_not_taken_for_one() -> None:
    def broken(value: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        judge_precondition(bounded(at_least=1), broken)


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("above: 0", "abov: 0", "planted.yaml:10: unknown key 'abov' in falsifiers[0].check; did you mean 'above'?"),
        ("above: 0", "above: 0, at_least: 0", "either above or at_least"),
        ("above: 0, ", "", "either above or at_least"),
        ("at_most: 1", "at_most: 1, below: 1", "both an upper bound"),
        ("above: 0, at_most: 1", "above: 1, at_most: 1", "no value is within the bounds"),
        ("type: number, above: 0, at_most", "type: whole, above: 0, below", "no value is within the bounds"),
        ("type: number, above: 0", "type: whole, above: 0.5", "the bounds of whole numbers are whole"),
        ("at_most: 1", "at_most: 1" + "0" * 400, "a bound is at most 9007199254740992"),
        ("accepts:", "acepts:", "unknown key 'acepts' in falsifiers[0].check; did you mean 'accepts'?"),
        ("type: number", "type: float", "falsifiers[0].check.type = 'float'"),
        ("with: {mutant: unchecked}", "change: {rows: 0}", "it has with, and nothing else"),
    ],
)
def test_it_is_read_as_strictly_as_the_rest(tmp_path: Path, right: str, wrong: str, said: str) -> None:
    assert right in GOOD
    (tmp_path / "planted.yaml").write_text(GOOD)
    assert str(next(iter(load_contracts(tmp_path))).falsifiers[0].check) == (
        "latentforge.x:takes takes a number above 0, at_most 1"
    )
    (tmp_path / "planted.yaml").write_text(GOOD.replace(right, wrong))
    with pytest.raises(RefusedError) as refused:
        load_contracts(tmp_path)
    assert said in str(refused.value)
