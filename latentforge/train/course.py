"""The way of one model through its steps: where a step is bad the run stops, or leaves its batch out once and says so."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from latentforge.errors import FailedError
from latentforge.spec.endurance import Policy
from latentforge.train.checkpoint import drop_after, newest_checkpoint
from latentforge.train.keeping import Keeper
from latentforge.train.loop import NotFinite
from latentforge.train.reading import left_out_of, steps_of
from latentforge.train.resume import Earlier

WINDOW = 100
"""Losses that the running median is of."""

Made = TypeVar("Made")


class Watch:
    """Whether a loss diverges: above ``factor`` times the median of the last 100 that were not, ``patience`` times in a
    row. Nothing is judged before there are ``patience`` of these, nor where their median is not above 0."""

    def __init__(self, factor: float | None, patience: int) -> None:
        self.factor, self.patience = factor, patience
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.median = 0.0
        self.onset: int | None = None
        """The step (from 0) at which the losses that are too high began; None where the last one was not."""

    def feed(self, step: int, loss: float) -> bool:
        """Take the loss of ``step``; whether it is the last of ``patience`` that are too high."""
        if self.factor is None:
            return False
        if len(self._losses) >= self.patience:
            self.median = statistics.median(self._losses)
            if 0.0 < self.factor * self.median < loss:
                self.onset = step if self.onset is None else self.onset
                return step - self.onset + 1 >= self.patience
        self._losses.append(loss)
        self.onset = None
        return False


class Course:
    """The steps of one model that are still to be made after the ``first``.

    A step without a finite loss or gradient updates nothing: with ``stop`` it ends the run, with ``skip`` its batch is
    left out. One that makes the loss diverge is found later: with ``skip`` the run goes back to the newest checkpoint
    before it and leaves its batch out when it comes there again. A second bad step within ``patience`` steps of one that
    was left out is the same place, and ends the run.
    """

    def __init__(self, keeper: Keeper, policy: Policy, *, first: int, earlier: Earlier | None) -> None:
        self._keeper = keeper
        self._policy = policy
        self._at = first
        said = [] if earlier is None else earlier.events
        self._left_out = set(left_out_of(said, keeper.model))
        self._losses = {step - 1: fields["loss"] for step, fields in steps_of(said, keeper.model).items()}
        self._losses = {step: loss for step, loss in self._losses.items() if step < first}
        self._watch = self._watched(first)
        if policy.on_bad_step == "skip" and first == 0:
            keeper.keep(0)  # there is a state to go back to before the first checkpoint is due

    def steps(self) -> Iterator[int]:
        """The steps that are to be made, from 0, in their order; after going back, from there again."""
        for leg in self.legs():
            yield from self.along(leg)

    def legs(self) -> Iterator[range]:
        """The steps in stretches without a gap: each ends before a step that is left out, or where :meth:`along` does."""
        while self._at < self._keeper.steps:
            if self._at in self._left_out:
                self._at += 1
                self._keeper.after(self._at, None)
                continue
            yield range(self._at, min((s for s in self._left_out if s > self._at), default=self._keeper.steps))

    def along(self, leg: range) -> Iterator[int]:
        """The steps of a leg, until the run goes back."""
        for step in leg:
            self._at = step + 1
            yield step
            if self._at != step + 1:
                return

    def attempt(self, step: int, make: Callable[[], Made]) -> Made | None:
        """What ``make`` makes of ``step``; None where it was bad and is left out. FailedError where it ends the run."""
        before = torch.get_rng_state()
        try:
            return make()
        except NotFinite as bad:
            self._keeper.optimiser.forget_gradients()
            torch.set_rng_state(before)
            if self._keeper.kept != step and step > 0:
                self._keeper.keep(step)  # the state is that before the step
            self._judge(step, step, bad)
        self._leave_out(step, str(bad_reason := "its loss or its gradient was not finite"), back_to=step)
        self._keeper.after(step + 1, None)
        return None

    def went_back(self, step: int, loss: float) -> bool:
        """Take the loss of a step that was made; True where the run went back, since the loss diverges."""
        self._losses[step] = loss
        diverges = self._watch.feed(step, loss)
        onset = self._keeper.spare = self._watch.onset
        if not diverges or onset is None:
            return False
        text = (
            f"the loss of the {self._keeper.model} diverges: {loss:.4g} at step {step + 1}, for {self._watch.patience} "
            f"steps above {self._watch.factor:g} x {self._watch.median:.4g}, the median of the last before"
        )
        self._judge(onset, step, FailedError(text, next=NotFinite.NEXT))
        self._leave_out(onset, text, back_to=self._go_back(onset))
        return True
