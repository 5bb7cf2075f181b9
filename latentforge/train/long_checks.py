"""Executable checks of what makes a training of days end well: on a tiny trainer, in a run folder of its own."""

from __future__ import annotations

import io
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from latentforge.contracts.finding import Finding
from latentforge.errors import RefusedError
from latentforge.events import Event, EventLog, read_events
from latentforge.spec.identity import RunIdentity
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.train import keeping
from latentforge.train.best import Best
from latentforge.train.checkpoint import Checkpoint, Position, load_checkpoint
from latentforge.train.course import Course
from latentforge.train.generators import Generators
from latentforge.train.keeping import Keeper
from latentforge.train.loop import Trainer, log_step, refuse_not_finite
from latentforge.train.products import start_digests
from latentforge.train.reading import SKIPPED, left_out_of, steps_of
from latentforge.train.rehearsal import fixture_targets, small_batch, small_trainer
from latentforge.train.resume import Earlier

STEPS = 6
_MODEL = "student"
_ROWS = Position("0" * 64, seed=7, batch_size=4)


@contextmanager
def _kept(**asked: Any) -> Iterator[tuple[Trainer, Keeper]]:
    """A tiny trainer and the keeper of its checkpoints, of a run of which ``asked`` says what is done at a bad step."""
    trainer = small_trainer()
    identity = RunIdentity("distill", {"endurance": asked}, {}, "a" * 64, "b" * 64)
    with tempfile.TemporaryDirectory(prefix="latentforge-") as folder:
        launch = LaunchRecord(identity.run_id, "c" * 64, {}, endurance={"disk_floor_mib": 0})
        run = RunDir.create(Path(folder), identity, launch)
        model, optimiser = trainer.student.model, trainer.optimiser
        start = start_digests(optimiser)
        with (
            EventLog(run.events_file, run.run, text=io.StringIO()) as log,
            Keeper(run, log, model, optimiser, _MODEL, start, STEPS, STEPS, _ROWS) as keeper,
        ):
            yield trainer, keeper


def _trained(bad: int, mutant: str | None) -> list[Event]:
    """The events of six steps, of which the loss of ``bad`` (from 1) is no number and its batch is left out."""
    with _kept(on_bad_step="skip", divergence_steps=2) as (trainer, keeper):

        def step(number: int) -> Any:
            if number + 1 == bad:
                refuse_not_finite("loss", float("nan"), number)
            return trainer.step(number, small_batch(number), fixture_targets())

        course = Course(keeper, Best(keeper, wanted=False, every=None), first=0, earlier=None)
        for number in course.steps():
            done = course.attempt(number, partial(step, number))
            if done is not None:
                log_step(keeper.log, done, step=number + 1, steps=STEPS, model=_MODEL)
        keeper.settle()
        events = read_events(keeper.run.events_file)
    return [event for event in events if mutant != "silent" or event.fields.get("name") != SKIPPED]


def left_out_is_said(*, mutant: str | None = None) -> Finding:
    """Of six steps, one of them bad, each is either made or said to be left out. ``mutant`` "silent" says nothing."""
    events = _trained(4, mutant)
    made, said = steps_of(events, _MODEL), left_out_of(events, _MODEL)
    missing = sorted(set(range(1, STEPS + 1)) - made.keys() - said.keys())
    text = f"{len(made)} of {STEPS} steps made, {len(said)} said to be left out, {len(missing)} missing without a word"
    return Finding(not missing and list(said) == [4], text, {"made": len(made), "missing": len(missing)})


def other_rows_are_refused(*, mutant: str | None = None) -> Finding:
    """A checkpoint is gone on from with its own rows, and refused with others, another order or another batch size.
    ``mutant`` "blind" takes every position for its own."""
    others = (replace(_ROWS, rows_sha256="1" * 64), replace(_ROWS, seed=8), replace(_ROWS, batch_size=2))
    refused = 0
    with _kept() as (_, keeper):
        keeper.keep(3)
        keeper.settle()
        found = load_checkpoint(path := keeper.folder / "step-000003")
        earlier = Earlier("distill-" + "0" * 20, 3, path, [])
        resumed = keeper.resume(earlier)
        for other in others:
            keeper.position = found.position if mutant == "blind" else other
            try:
                keeper.resume(earlier)
            except RefusedError:
                refused += 1
    text = f"{refused} of {len(others)} other rows, orders and batch sizes refused"
    return Finding(resumed == 3 and refused == len(others), text, {"refused": refused})


def steps_leave_a_checkpoint_alone(*, mutant: str | None = None) -> Finding:
    """A step made while a checkpoint is written does not reach it. ``mutant`` "shared" writes the live tensors."""
    made, save = threading.Event(), keeping.save_checkpoint

    def held(*args: Any, **how: Any) -> Any:
        made.wait(60.0)
        return save(*args, **how)

    def live(model: str, step: int, weights: Any, moments: Any, position: Position) -> Checkpoint:
        return Checkpoint(model, step, dict(weights), dict(moments), Generators.now(), 1, position)

    with _kept() as (trainer, keeper), _planted("save_checkpoint", held):
        trainer.step(0, small_batch(), fixture_targets())
        wanted = {name: value.detach().clone() for name, value in trainer.optimiser.masters.items()}
        with _planted("snapshot", live if mutant == "shared" else keeping.snapshot):
            keeper.keep(1)
        trainer.step(1, small_batch(1), fixture_targets())
        made.set()
        keeper.settle()
        found = load_checkpoint(keeper.folder / "step-000001").weights
    equal = sum(torch.equal(found[name], value) for name, value in wanted.items())
    text = f"{equal} of {len(wanted)} tensors as they were when the checkpoint was taken, a step before it was written"
    return Finding(equal == len(wanted), text, {"equal": equal, "tensors": len(wanted)})


@contextmanager
def _planted(name: str, value: Any) -> Iterator[None]:
    before = getattr(keeping, name)
    setattr(keeping, name, value)
    try:
        yield
    finally:
        setattr(keeping, name, before)
