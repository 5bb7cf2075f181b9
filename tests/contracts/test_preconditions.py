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
    assert sorted(inside) == [1, 2, 4, 5]
    assert {0, 6, 1.5} <= {value for value in outside if isinstance(value, int | float)}
    inside, outside = probes(bounded(above=0, below=6))
    assert sorted(inside) == [1, 5]
    assert {0, 6} <= {value for value in outside if isinstance(value, int)}


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
