"""Executable checks of what a teacher gives a trainer; contracts name these functions and plant their faults."""

from __future__ import annotations

import io
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentforge.contracts.finding import Finding
from latentforge.events import EventLog, read_events
from latentforge.targets.row import SequenceTargets
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.fixture import FixtureTeacher
from latentforge.teachers.protocol import Tokens
from latentforge.train import falsifiers
from latentforge.train.feed import Feed
from latentforge.train.loop import Lesson, StepResult, Trainer, log_step
from latentforge.train.onpolicy import OnPolicy
from latentforge.train.rehearsal import LENGTH, SEQUENCES, VOCABULARY, small_batch, small_trainer
from latentforge.train.supply import Supply
from latentforge.train.tally import Tally
from latentforge.verdicts import Outcome

_K = 8


class Elsewhere(FixtureTeacher):
    """The fixture as a server would answer: top-k rows, ``delay`` seconds a batch; after ``answers`` sequences it is
    gone. Sequence ``changed`` of a batch gets another answer than it should.
    """

    def __init__(self, *, delay: float = 0.0, answers: int | None = None, changed: int | None = None) -> None:
        super().__init__(VOCABULARY)
        self.delay = delay
        self.left = answers
        self.changed = changed

    def score(
        self, sequences: Sequence[Tokens], *, k: int, temperatures: tuple[float, ...]
    ) -> Iterator[tuple[int, SequenceTargets]]:
        """The fixture's rows."""
        threading.Event().wait(self.delay)
        for number, targets in super().score(sequences, k=k, temperatures=temperatures):
            if self.left is not None:
                if self.left == 0:
                    raise TeacherFailure("connection", "the server was killed", url="http://127.0.0.1:1/v1")
                self.left -= 1
            if number == self.changed:
                other = (targets.ids + 1) % VOCABULARY
                targets = SequenceTargets(other.astype(np.int32), targets.logprobs, targets.tails)
            yield number, targets


class _MakesUp(Supply):
    """Planted: what the teacher did not say is filled with the same rows everywhere, and counted as said."""

    def lesson(self, tokens: Tensor, found: Sequence[SequenceTargets | None]) -> Lesson:
        rows = tokens.shape[1] - 1
        ids = np.tile(np.arange(_K, dtype=np.int32), (rows, 1))
        flat = np.full((rows, _K), -np.log(VOCABULARY), dtype=np.float32)
        tail = np.full(rows, np.log1p(-_K / VOCABULARY), dtype=np.float32)
        made_up = SequenceTargets(ids, flat, {self.temperature: tail})
        return super().lesson(tokens, [made_up if one is None else one for one in found])


def supply_of(teacher: FixtureTeacher, kind: type[Supply] = Supply) -> Supply:
    """Top-8 rows of a teacher elsewhere, whose loss is survived."""
    return kind(teacher, temperature=1.0, k=_K, width=VOCABULARY, on_loss="degrade", ce_alone=1.0)


def coverage_is_what_was_taught(*, mutant: str | None = None) -> Finding:
    """A teacher is lost in the middle of a batch: the coverage that the run's events report is that of the sequences
    whose answers move the gradient. ``mutant`` "made-up" fills the gap with rows that no teacher said.
    """
    kind, answers = (_MakesUp if mutant else Supply), SEQUENCES - 5
    with tempfile.TemporaryDirectory(prefix="latentforge-") as folder:
        path = Path(folder) / "events.jsonl"
        with EventLog(path, "distill-" + "0" * 20, text=io.StringIO()) as log:
            asked = {"distill": {"kd_weight": 0.7, "on_teacher_loss": "degrade"}}
            log.ready(requested=asked, effective=asked)
            plain, result, fields = _one_step(supply_of(Elsewhere(answers=answers), kind))
            log_step(log, result, step=1, steps=1, model="student", **fields)
            tally = Tally()
            tally.add({"rows": result.rows, **fields})
            said = {"step": 1, "split": "train", "model": "student", **tally.fields()}
            log.emit("metric", name="kd_coverage", value=tally.coverage, **said)
        verdict = falsifiers.coverage_001(read_events(path))
    changed = (_one_step(supply_of(Elsewhere(answers=answers, changed=n), kind))[0] for n in range(SEQUENCES))
    moved = sum(bool((gradient - plain).abs().max() > 1e-9) for gradient in changed) * (LENGTH - 1)
    reported = verdict.measured.get("rows_with_targets")
    text = f"{verdict.text}; the teacher's answers to {moved} rows moved the gradient"
    passed = verdict.outcome is Outcome.PASS and reported == moved == answers * (LENGTH - 1)
    return Finding(passed, text, {"reported": reported, "moved": moved, "rows": SEQUENCES * (LENGTH - 1)})


def _one_step(supply: Supply) -> tuple[Tensor, StepResult, dict[str, Any]]:
    trainer = small_trainer(ce_weight=0.3, kd_weight=0.7, micro_batch_size=6)
    trainer.optimiser.step = lambda: 0.0  # type: ignore[method-assign]
    with Feed(lambda step: small_batch(), range(1), supply=supply, ahead=0, micro_batch_size=6) as feed:
        given = feed.next(0, trainer.student)
        result = trainer.step(0, given.tokens, given.lessons)
    gradients = [p.grad.reshape(-1) for p in trainer.optimiser.masters.values() if p.grad is not None]
    return torch.cat(gradients), result, given.fields


def delay_is_hidden(*, ahead: int = 2, delay: float = 0.2, steps: int = 6) -> Finding:
    """Of a teacher's ``delay`` seconds a batch, what the step before could cover is hidden. ``ahead`` 0 plants a
    trainer that asks when it needs the answer.

    Covered can be, of each fetch but the first, as much as the step before it took; hidden is what the fetch took and
    no step waited for. Both are counted in one run; the best of up to three, since another process may keep the thread
    that hides the delay from running.
    """
    found = _hidden(ahead=ahead, delay=delay, steps=steps)
    for _ in range(2):
        if not found.passed:
            found = max(found, _hidden(ahead=ahead, delay=delay, steps=steps), key=lambda one: one.measured["share"])
    return found


def _hidden(*, ahead: int, delay: float, steps: int) -> Finding:
    trainer = small_trainer(ce_weight=0.3, kd_weight=0.7, micro_batch_size=1)
    computed, fetched, waited = _timed(trainer, ahead=ahead, delay=delay, steps=steps)
    coverable = sum(min(fetch, compute) for fetch, compute in zip(fetched[1:], computed, strict=False))
    uncovered = sum(max(0.0, fetch - compute) for fetch, compute in zip(fetched[1:], computed, strict=False))
    share = 1.0 - max(0.0, sum(waited[1:]) - uncovered) / coverable
    text = (
        f"{share:.1%} of {coverable:.2f} s that {steps - 1} steps could cover were hidden "
        f"({sum(waited):.2f} of {sum(fetched):.2f} s were waited for)"
    )
    measured = {"share": share, "coverable": coverable, "waited": sum(waited), "fetched": sum(fetched), "ahead": ahead}
    return Finding(share >= 0.9, text, measured)


def _timed(trainer: Trainer, *, ahead: int, delay: float, steps: int) -> tuple[list[float], list[float], list[float]]:
    """Seconds of each step's computation, of its fetch and of its wait."""
    supply = supply_of(Elsewhere(delay=delay))
    computed, fetched, waited = [], [], []
    with Feed(small_batch, range(steps), supply=supply, ahead=ahead, micro_batch_size=1) as feed:
        for step in range(steps):
            given = feed.next(step, trainer.student)
            began = time.perf_counter()
            trainer.step(step, given.tokens, given.lessons)
            computed.append(time.perf_counter() - began)
            fetched.append(given.fields["target_seconds"])
            waited.append(given.fields["target_wait_seconds"])
    return computed, fetched, waited


def own_share_is_the_students(*, mutant: str | None = None) -> Finding:
    """At a share of one half, half of the sequences that are trained end in what the student itself draws, and their
    ends have no labels. ``mutant`` "data" trains the data's text and reports it as the student's.
    """
    policy = (_Copies if mutant else OnPolicy)(0.5, 6, 1.0, 7)
    trainer, steps, own, reported = small_trainer(ce_weight=0.3, kd_weight=0.7), 3, 0, 0
    supply = supply_of(Elsewhere())
    with Feed(small_batch, range(steps), supply=supply, ahead=2, on_policy=policy) as feed:
        for step in range(steps):
            given = feed.next(step, trainer.student)
            lessons = list(given.lessons or ())
            drawn = OnPolicy(0.5, 6, 1.0, 7).write(trainer.student, given.tokens, step, 0)
            at = 0
            for lesson in lessons:
                place = slice(at, at + len(lesson.tokens))
                at += len(lesson.tokens)
                ends = (lesson.tokens[:, -6:] == drawn[place, -6:]).all(1)
                if lesson.use is not None:
                    labelled = lesson.use.labelled.reshape(len(lesson.tokens), -1)
                    own += int((ends & ~labelled[:, -6:].any(1) & labelled[:, :-6].all(1)).sum())
            trainer.step(step, given.tokens, lessons)
            reported += given.fields["on_policy_sequences"]
    total = steps * SEQUENCES
    text = f"{own} of {total} sequences end in the student's own text without labels; {reported} are reported"
    return Finding(own == reported == total // 2, text, {"own": own, "reported": reported, "sequences": total})


class _Copies(OnPolicy):
    """Planted: the student's text is the data's."""

    def write(self, student: Any, tokens: Tensor, step: int, first: int) -> Tensor:
        return tokens
