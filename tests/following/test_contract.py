"""The checks of contracts/watching.yaml hold, and each fails on what was planted for it."""

from __future__ import annotations

import importlib

import pytest

from latentforge.contracts import load_contracts

FALSIFIERS = next(one for one in load_contracts() if one.contract == "watching").falsifiers


@pytest.mark.parametrize("falsifier", FALSIFIERS, ids=lambda one: one.id)
def test_the_check_passes_and_its_control_fails(falsifier: object) -> None:
    module, _, name = falsifier.check.partition(":")  # type: ignore[attr-defined]
    check = getattr(importlib.import_module(module), name)
    found = check(**falsifier.arguments)  # type: ignore[attr-defined]
    assert found.passed is True, found.text
    assert check(**falsifier.control_arguments).passed is False  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="unknown mutant 'other'"):
        check(mutant="other")


def test_every_rule_of_the_watcher_belongs_to_a_falsifier_of_the_contract() -> None:
    from dispatch.following.record import RULES

    assert set(RULES.values()) <= {one.id for one in FALSIFIERS}
