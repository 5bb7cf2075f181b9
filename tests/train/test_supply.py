"""A lost teacher is asked again, less and less often; an answer that cannot be trusted is no loss."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from latentforge.events import EventLog
from latentforge.teachers.cached import CachedTeacher
from latentforge.teachers.crossed import CrossedTeacher
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.prefetch import Prefetcher
from latentforge.train.distill import held_out
from latentforge.train.rehearsal import small_batch, small_trainer
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


def test_giving_up_leaves_the_cache_open_for_the_answer_that_is_still_coming(tmp_path: Path) -> None:
    """Behind a bridge as well: the teacher alone is closed, else what it answers last is paid for and lost."""
    begun, closed, batch = threading.Event(), threading.Event(), small_batch()[:1]

    class Slow(Elsewhere):
        def score(self, sequences: Any, *, k: int, temperatures: tuple[float, ...]) -> Any:
            begun.set()
            assert closed.wait(60)
            yield from super().score(sequences, k=k, temperatures=temperatures)

        def close(self) -> None:
            closed.set()

    asked: dict[str, Any] = {"k": 8, "temperatures": (1.0,)}
    cached = CachedTeacher.open(tmp_path / "kd.sqlite", Slow(), **asked)
    supply = supply_of(CrossedTeacher(cached, None))  # type: ignore[arg-type]
    with Prefetcher(
        lambda step: list(cached.score(list(batch.numpy()), **asked)), range(1), ahead=1, cancel=supply.give_up
    ):
        assert begun.wait(60)
    assert cached.store.stats()["rows"] == 1
    cached.close()


class Rows(list[Any]):
    """A shard of few rows."""

    def rows(self, indices: Any) -> Any:
        return np.stack([self[at] for at in indices])


@pytest.mark.parametrize(("kind", "survived"), [("connection", True), ("budget", True), ("wrong-ids", False)])
def test_held_out_rows_that_cannot_be_trusted_stop_a_run_that_was_to_go_on(
    tmp_path: Path, kind: Any, survived: bool
) -> None:
    """A resumed run asks for them at its end only: an answer to another question is no teacher that was lost."""

    class Failing(Elsewhere):
        def score(self, sequences: Any, *, k: int, temperatures: tuple[float, ...]) -> Any:
            raise TeacherFailure(kind, "no answer, or not to this")
            yield

    rows = small_batch().numpy()
    with EventLog(tmp_path / "events.jsonl", "distill-" + "0" * 20, text=io.StringIO()) as log:
        job: Any = SimpleNamespace(
            spec=SimpleNamespace(temperature=1.0, micro_batch_size=None, batch_size=32),
            kernel="reference",
            device=torch.device("cpu"),
            data=SimpleNamespace(heldout=Rows(rows)),
            supply=supply_of(Failing()),
            log=log,
        )
        trainer = small_trainer(ce_weight=0.3, kd_weight=0.7)
        if survived:
            assert held_out(job, trainer.engine.module).kl is None
            return
        with pytest.raises(TeacherFailure, match=kind):
            held_out(job, trainer.engine.module)
