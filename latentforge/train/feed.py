"""What each step of a trainer is given: its batch as lessons, fetched ahead, some of it the student's own text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from latentforge.students.causal import IGNORE, Student, told
from latentforge.teachers.prefetch import Prefetcher, interruptible
from latentforge.train.engines.world import World
from latentforge.train.loop import Lesson
from latentforge.train.onpolicy import OnPolicy, written_fields
from latentforge.train.supply import Supply

NOTHING_WRITTEN = OnPolicy(0.0, 1, 1.0, 0)


@dataclass(frozen=True)
class Given:
    """One step's material: the data's ``tokens`` int64 [B, L]; the ``lessons`` that are trained of them, to be gone
    through once (None: the tokens themselves, without a teacher); the seconds that the step has stood still for its
    teacher; and what its event says of all this, complete once the lessons are trained.
    """

    tokens: Tensor
    lessons: Iterable[Lesson] | None
    wait_seconds: float
    fields: dict[str, Any]


class Feed:
    """The material of ``steps`` in their order: ``batch_of(step)``, int64 [B, L], with what ``supply`` has for it.

    Targets of the data are fetched up to ``ahead`` steps before they are used, but dense ones of a teacher in this
    process only where they do not take too much memory (``dense_fits``); else teacher and student take turns. The
    student's own text cannot be fetched: it depends on the weights of its step, so its teacher is waited for:
    ``judge``, where it is another one than that of the data. Without a supply nothing is fetched. Of several processes
    in a ``world`` each is given lessons of its share. A context.
    """

    def __init__(
        self,
        batch_of: Callable[[int], Tensor],
        steps: range,
        *,
        supply: Supply | None,
        ahead: int,
        dense_fits: bool = True,
        on_policy: OnPolicy = NOTHING_WRITTEN,
        judge: Supply | None = None,
        micro_batch_size: int | None = None,
        eos_id: int = -1,
        interrupted: Callable[[], bool] = lambda: False,
        world: World | None = None,
    ) -> None:
        self._batch_of = batch_of
        self._world = World() if world is None else world
        self._supply = supply
        self._judge = supply if judge is None else judge
        self.asked_ahead = ahead
        self.on_policy = on_policy
        self._size = micro_batch_size
        self._eos_id = eos_id
        fits = supply is None or supply.k is not None or dense_fits
        # A teacher in this process ends its answer soon; one elsewhere may take its whole time-out.
        give_up = supply.give_up if supply is not None and supply.elsewhere else None
        # Processes that share their steps agree on the one after which they end: none stops in a wait by itself.
        self._interrupted = interrupted if self._world.size == 1 else lambda: False
        self._ahead = Prefetcher(
            self._material,
            steps,
            ahead=ahead if supply is not None and fits else 0,
            cancel=give_up,
            interrupted=self._interrupted,
        )

    @property
    def ahead(self) -> int:
        """How many steps before its own a batch is fetched."""
        return self._ahead.ahead

    def __enter__(self) -> Self:
        self._ahead.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._ahead.close()

    def next(self, step: int, student: Student) -> Given:
        """The material of ``step``; ``student`` writes its share of it. TeacherFailure where the teacher's loss stops
        the run, Interrupted where it is told to stop while it waits for a teacher elsewhere and is alone in its world.
        """
        taken = self._ahead.take(step)
        tokens, fetched = taken.value
        if self._supply is None:
            return Given(tokens, None, 0.0, {})
        data, own = self._shares(step, tokens)
        fields: dict[str, Any] = {
            "target_rows": 0,
            "silent_rows": 0,
            "target_seconds": taken.fetch_seconds,
            "target_wait_seconds": taken.wait_seconds,
            "target_hidden_seconds": taken.hidden_seconds,
        }
        lessons: Iterable[Lesson] = self._in_turn(self._supply, data, fields) if fetched is None else fetched
        waited = taken.wait_seconds
        if len(own):
            written = self.on_policy.write(student, own, step, len(data))
            more, seconds = self._judged(own, written, fields)
            lessons, waited = chain(lessons, more), waited + seconds
        return Given(tokens, _counted(lessons, fields, student), waited, fields)

    def _shares(self, step: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The sequences of the data, and those that the student continues: the last of the batch. Of several processes
        none writes text."""
        own = self.on_policy.count(step, len(tokens))
        data = tokens[: len(tokens) - own]
        return data[self._world.share(len(data))], tokens[len(tokens) - own :]

    def _material(self, step: int) -> tuple[Tensor, list[Lesson] | None]:
        tokens = self._batch_of(step)
        if self._supply is None or (self._supply.k is None and self.ahead == 0):
            return tokens, None
        data, _ = self._shares(step, tokens)
        return tokens, list(self._supply.lessons(data, self._size or len(tokens))) if len(data) else []

    def _in_turn(self, supply: Supply, tokens: Tensor, fields: dict[str, Any], own: bool = False) -> Iterator[Lesson]:
        """Lessons whose targets a teacher in this process computes when each is trained."""
        lessons = supply.lessons(tokens, self._size or len(tokens)) if len(tokens) else iter(())
        while True:
            began = time.perf_counter()
            lesson = next(lessons, None)
            _spend(fields, time.perf_counter() - began)
            if lesson is None:
                return
            if own:
                use = self.on_policy.use(lesson.tokens, supply.ce_alone)
                lesson = replace(lesson, use=use)
            yield lesson

    def _judged(self, tokens: Tensor, written: Tensor, fields: dict[str, Any]) -> tuple[Iterable[Lesson], float]:
        """Lessons of the student's text ``written``, int64 [n, L] as ``tokens`` of the data, and the seconds waited.

        A sequence that the teacher does not answer for stays the data's, and has cross-entropy alone: of the student's
        own text nothing can be learnt without its teacher.
        """
        supply, mine = self._judge, self.on_policy
        assert supply is not None
        if not supply.elsewhere:
            fields |= {"on_policy_sequences": len(written), **written_fields(written, mine.tokens, self._eos_id)}
            return self._in_turn(supply, written, fields, own=True), 0.0
        began = time.perf_counter()
        # Its time-outs and retries may take minutes: who is told to stop does not stand them out.
        found = interruptible(lambda: supply.ask(written), cancel=supply.give_up, interrupted=self._interrupted)
        seconds = time.perf_counter() - began
        _spend(fields, seconds)
        size, lessons = self._size or len(tokens), []
        answered = [number for number, one in enumerate(found) if one is not None]
        fields["on_policy_sequences"] = len(answered)
        if answered:
            fields |= written_fields(written[answered], mine.tokens, self._eos_id)
        for at in range(0, len(answered), size):
            chosen = answered[at : at + size]
            lesson = supply.lesson(written[chosen], [found[number] for number in chosen])
            lessons.append(replace(lesson, use=mine.use(lesson.tokens, supply.ce_alone)))
        missing = [number for number, one in enumerate(found) if one is None]
        for at in range(0, len(missing), size):
            chosen = missing[at : at + size]
            lessons.append(supply.lesson(tokens[chosen], [None] * len(chosen)))
        return lessons, seconds


def _spend(fields: dict[str, Any], seconds: float) -> None:
    fields["target_seconds"] += seconds
    fields["target_wait_seconds"] += seconds


def _counted(lessons: Iterable[Lesson], fields: dict[str, Any], student: Student) -> Iterator[Lesson]:
    for lesson in lessons:
        if lesson.targets is not None:
            text = student.labels(lesson.tokens) != IGNORE
            if lesson.use is not None:  # its targets are of the taught rows alone
                text = text[lesson.use.taught]
            heard = told(lesson.targets)
            fields["target_rows"] += int((heard & text).sum())
            fields["silent_rows"] += int((~heard & text).sum())
        yield lesson
