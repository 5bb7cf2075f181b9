"""Faults of training: the trainer or its optimiser changed, or the events of a run that did something else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from latentforge.contracts import Finding
from latentforge.events import Event
from latentforge.students import causal
from latentforge.students.causal import Student
from latentforge.train import optimiser
from latentforge.train.falsifiers import REQUIRABLE
from latentforge.train.optimiser import MasterOptimiser
from latentforge.train.rehearsal import fixture_targets
from latentforge.verdicts import Outcome

from ..train.test_falsifiers import change, good_events
from .frame import claim, mutant, untouched


def _trainer(name: str, by: str, place: Any, attribute: str, wrong: Any, *, how: str) -> None:
    """A mutant that replaces one function of the trainer; ``wrong`` is given the right one."""

    @mutant("training", name, how=how, by=by)
    def _(folder: Path, planted: bool) -> str | None:
        if not planted:
            return _said(untouched(by))
        with mock.patch.object(place, attribute, wrong(getattr(place, attribute))):
            return _said(claim(by)())


def _said(found: Finding) -> str | None:
    return None if found.passed is not False else found.text


def _last_sequence(forward: Any) -> Any:
    def wrong(self: Student, tokens: Any, targets: Any, denominator: float, **settings: Any) -> Any:
        return forward(self, tokens[-1:], fixture_targets()(tokens[-1:]), denominator, **settings)

    return wrong


def _own_denominator(forward: Any) -> Any:
    def wrong(self: Student, tokens: Any, targets: Any, denominator: float, **settings: Any) -> Any:
        return forward(self, tokens, targets, tokens[:, 1:].numel(), **settings)

    return wrong


def _constant_rate(set_learning_rate: Any) -> Any:
    def wrong(self: MasterOptimiser, step: int) -> float:
        for group in self.groups:
            group["lr"] = 1e-3
        return 1e-3

    return wrong


def _one_group(set_learning_rate: Any) -> Any:
    def wrong(self: MasterOptimiser, step: int) -> float:
        kept = [group["lr"] for group in self.groups[1:]]
        rate = float(set_learning_rate(self, step))
        for group, value in zip(self.groups[1:], kept, strict=True):
            group["lr"] = value
        return rate

    return wrong


def _without(**forgotten: Any) -> Callable[[Any], Any]:
    """The optimiser's step with something of its groups, or of itself, forgotten."""

    def wrapped(step: Any) -> Any:
        def wrong(self: MasterOptimiser) -> float:
            for name, value in forgotten.items():
                if name == "clip_norm":
                    self.clip_norm = value
                for group in self.groups:
                    if name in group:
                        group[name] = value
            return float(step(self))

        return wrong

    return wrapped


def _loss_with(**settings: Any) -> Callable[[Any], Any]:
    def wrapped(kd_loss: Any) -> Any:
        def wrong(student: Any, targets: Any, labels: Any, **given: Any) -> Any:
            return kd_loss(student, targets, labels, **{**given, **settings})

        return wrong

    return wrapped


_trainer(
    "last-row-only training",
    "F-BATCH-ROWS-001",
    Student,
    "forward",
    _last_sequence,
    how="the student trains the last sequence of a batch and is paid for all",
)
_trainer(
    "micro-batches divided by their own rows",
    "F-BATCH-DENOMINATOR-001",
    Student,
    "forward",
    _own_denominator,
    how="each micro-batch is divided by its own rows",
)
_trainer(
    "learning rate ignored",
    "F-EFFECTIVE-LR-001",
    MasterOptimiser,
    "set_learning_rate",
    _constant_rate,
    how="the optimiser steps with 1e-3 whatever was asked",
)
_trainer(
    "norms kept at their peak",
    "F-EFFECTIVE-LR-002",
    MasterOptimiser,
    "set_learning_rate",
    _one_group,
    how="the schedule reaches the first of the optimiser's groups alone, which is the one that events tell of",
)
_trainer(
    "warm-up forgotten",
    "F-EFFECTIVE-LR-002",
    optimiser,
    "warmup_cosine",
    lambda schedule: lambda warmup_steps, steps: schedule(0, steps),
    how="the schedule begins at its peak, for the trainer and for who judges its events alike",
)
_trainer(
    "weight decay dropped",
    "F-EFFECTIVE-DECAY-001",
    MasterOptimiser,
    "step",
    _without(weight_decay=0.0),
    how="all groups decay by nothing",
)
_trainer(
    "gradient not clipped",
    "F-EFFECTIVE-CLIP-001",
    MasterOptimiser,
    "step",
    _without(clip_norm=None),
    how="the clipping norm is forgotten before the step",
)
_trainer(
    "gradient ascent",
    "F-DISTILL-STUDENT-001",
    MasterOptimiser,
    "step",
    _without(maximize=True),
    how="AdamW climbs the loss",
)
_trainer(
    "optimiser that never steps",
    "F-DISTILL-STUDENT-002",
    MasterOptimiser,
    "step",
    lambda step: lambda self: 0.0,
    how="a step that does nothing and reports a norm of 0",
)
_trainer(
    "trained at T = 1",
    "F-EFFECTIVE-OBJECTIVE-001",
    causal,
    "kd_loss",
    _loss_with(temperature=1.0),
    how="the temperature of the spec never reaches the loss",
)
_trainer(
    "trained on the reverse KL",
    "F-EFFECTIVE-OBJECTIVE-001",
    causal,
    "kd_loss",
    _loss_with(direction="reverse"),
    how="the student's step descends KL(student, teacher)",
)
_trainer(
    "labels not shifted",
    "F-STUDENT-LABEL-001",
    Student,
    "labels",
    lambda labels: lambda self, tokens: labels(self, tokens).reshape(len(tokens), -1).roll(1, 1).reshape(-1),
    how="each row's label is the one before it",
)
_trainer(
    "optimiser state not saved",
    "F-ARTEFACT-RESUME-001",
    MasterOptimiser,
    "load",
    lambda load: (
        lambda self, masters, moments: load(
            self,
            masters,
            {name: value if name.endswith("/step") else torch.zeros_like(value) for name, value in moments.items()},
        )
    ),
    how="a resumed run begins with moments of zero",
)


def _events(
    name: str, falsifier: str, told: Callable[[list[Event]], list[Event]], *, how: str, area: str = "events"
) -> None:
    """A mutant of a run: what its events say where something else was done."""

    @mutant(area, name, how=how, by=falsifier)
    def _(folder: Path, planted: bool) -> str | None:
        events = told(copy.deepcopy(good_events())) if planted else good_events()
        found = REQUIRABLE[falsifier](events)
        return None if found.outcome is Outcome.PASS else f"{found.outcome.name} {found.text}"


def _without_kind(kind: str, **where: Any) -> Callable[[list[Event]], list[Event]]:
    return lambda events: [e for e in events if not (e.kind == kind and where.items() <= e.fields.items())]


def _renamed(kind: str, old: str, new: str) -> Callable[[list[Event]], list[Event]]:
    def told(events: list[Event]) -> list[Event]:
        for event in events:
            if event.kind == kind and old in event.fields:
                event.fields[new] = event.fields.pop(old)
        return events

    return told


_STEP = {"model": "student", "step": 3}
_events(
    "effective learning rate changed",
    "F-EFFECTIVE-LR-001",
    lambda e: change(e, "step", _STEP, learning_rate=5e-4),
    how="one step's optimiser held half of the rate that was asked",
)
_events(
    "fewer rows than paid for",
    "F-BATCH-ROWS-001",
    lambda e: change(e, "step", _STEP, rows=7, denominator=7),
    how="one step trained one sequence of four",
)
_events("a step left out", "F-BATCH-ROWS-001", _without_kind("step", **_STEP), how="five of six steps were made")
_events(
    "another batch than the twin's",
    "F-DISTILL-SMOKE-002",
    lambda e: change(e, "step", _STEP, batch_sha256="another"),
    how="student and twin differ in more than the teacher",
)
_events(
    "other held-out rows at the end",
    "F-DISTILL-SMOKE-001",
    lambda e: change(e, "metric", {"model": "student", "name": "val_loss", "step": 6}, rows_sha256="easier rows"),
    how="the loss fell because it was measured on something else",
)
_events(
    "loss that is no number",
    "F-DISTILL-SMOKE-001",
    lambda e: change(e, "metric", {"model": "student", "name": "val_loss", "step": 6}, value="nan"),
    how="val_loss is NaN after the last step",
)
_events(
    "log line reworded",
    "F-KERNEL-NOJIT-001",
    _renamed("step", "compiles", "compilations"),
    how="the word that a count of zero was read from is another one",
)
_events(
    "compile inside a step",
    "F-KERNEL-NOJIT-001",
    lambda e: change(e, "step", _STEP, compiles=1),
    how="a kernel was compiled while the third step waited",
)
_events(
    "file of 200 bytes",
    "F-ARTEFACT-SIZE-001",
    lambda e: change(e, "checkpoint", {"step": 6}, bytes=200),
    how="the last checkpoint has 200 bytes",
)
_events(
    "one tensor never moved",
    "F-ARTEFACT-MOVED-001",
    lambda e: change(e, "checkpoint", {"step": 6}, moved=8, unmoved=["embed_tokens.weight"]),
    how="the embedding is where it began",
)
_events(
    "coverage overstated",
    "F-TEACHER-COVERAGE-001",
    lambda e: change(e, "step", _STEP, kd_rows=0),
    how="a step without its teacher, reported as taught",
)
_events(
    "ready event left out",
    "F-EFFECTIVE-CONFIG-001",
    _without_kind("phase", name="ready"),
    how="a run that never says what was in force",
)
_events(
    "another batch size in force",
    "F-EFFECTIVE-CONFIG-001",
    lambda e: change(e, "phase", {"name": "ready"}, effective={"distill": {"batch_size": 1}}),
    how="the trainer held a batch of 1 where 4 was asked",
)
