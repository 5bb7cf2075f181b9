"""A lost teacher is asked again, less and less often; an answer that cannot be trusted is no loss."""

from __future__ import annotations

from typing import Any

import pytest

from latentforge.teachers.failures import TeacherFailure
from latentforge.train.rehearsal import small_batch
from latentforge.train.supply_checks import Elsewhere, supply_of


def test_a_lost_teacher_is_left_alone_for_longer_and_longer_and_is_seen_to_come_back() -> None:
    teacher = Elsewhere(answers=0)
    supply, asked = supply_of(teacher), []
    for number in range(12):
        before = len(supply.notes)
        supply.ask(small_batch()[:2])
        if len(supply.notes) > before:
            asked.append(number)
    assert asked == [0, 2, 5, 10]
    teacher.left = None
    while "answers again" not in supply.notes[-1]:
        found = supply.ask(small_batch()[:2])
    assert all(one is not None for one in found)


@pytest.mark.parametrize("kind", ["shifted", "wrong-ids", "not-finite", "no-logprobs", "too-few", "collapsed"])
def test_an_answer_that_cannot_be_trusted_stops_a_run_that_was_to_go_on(kind: Any) -> None:
    class Wrong(Elsewhere):
        def score(self, sequences: Any, *, k: int, temperatures: tuple[float, ...]) -> Any:
            raise TeacherFailure(kind, "this is not the answer to what was asked")
            yield

    with pytest.raises(TeacherFailure, match=kind):
        supply_of(Wrong()).ask(small_batch())
