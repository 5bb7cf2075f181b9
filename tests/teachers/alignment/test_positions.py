"""The loss is least exactly where the teacher's row belongs."""

from __future__ import annotations

import pytest

from latentforge.train.position_checks import loss_is_least_at_its_position


def test_the_loss_is_least_at_the_position_of_the_unique_token_and_training_finds_it() -> None:
    found = loss_is_least_at_its_position()
    assert found.passed, found.text
    assert found.measured["right"] == 36
    assert abs(found.measured["losses"]["0"]) < 1e-4


@pytest.mark.parametrize("shift", [1, -1])
def test_rows_that_are_off_by_one_are_seen(shift: int) -> None:
    found = loss_is_least_at_its_position(shift=shift)
    assert not found.passed
    assert found.measured["right"] == 0
    assert f"least loss at shift {-shift:+d}" in found.text
