"""The contract of the watcher covers its rules, and its checks take no mutant that they do not know."""

from __future__ import annotations

import importlib

import pytest

from latentforge.contracts import load_contracts

FALSIFIERS = next(one for one in load_contracts() if one.contract == "watching").falsifiers


@pytest.mark.parametrize("falsifier", FALSIFIERS, ids=lambda one: one.id)
def test_a_check_refuses_a_mutant_that_it_does_not_know(falsifier: object) -> None:
    module, _, name = falsifier.check.partition(":")  # type: ignore[attr-defined]
    check = getattr(importlib.import_module(module), name)
    with pytest.raises(ValueError, match="unknown mutant 'other'"):
        check(mutant="other")


def test_every_rule_of_the_watcher_belongs_to_a_falsifier_of_the_contract() -> None:
    from dispatch.following.record import RULES

    assert set(RULES.values()) <= {one.id for one in FALSIFIERS}
