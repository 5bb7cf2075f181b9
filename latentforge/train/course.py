"""The way of one model through its steps: at a bad one it ends, or leaves that batch out, once, and says so."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from latentforge.errors import FailedError
from latentforge.events import Event, read_events, standing
from latentforge.spec.endurance import endurance_of
from latentforge.train import effective
from latentforge.train.best import Best
from latentforge.train.generators import Generators
from latentforge.train.keeping import Keeper
from latentforge.train.loop import NotFinite
from latentforge.train.reading import left_out_of, say_left_out, steps_of
from latentforge.train.resume import Earlier

WINDOW = 100
"""Losses that the running median is of."""

Made = TypeVar("Made")


class Watch:
    """Whether a loss diverges: above ``factor`` times the median of the last 100 that were not, ``patience`` times in a
    row. Nothing is judged before there are ``patience`` of these (the median is then of as many, where that is more),
    nor where it is not above 0."""

    def __init__(self, factor: float | None, patience: int) -> None:
        self.factor, self.patience = factor, patience
        self._losses: deque[float] = deque(maxlen=max(WINDOW, patience))
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

    A step without a finite loss or gradient has updated nothing: with ``stop`` it ends the run, with ``skip`` its batch
    is left out. That the loss diverges is known later: with ``skip`` the run goes back to the newest checkpoint before
    the last step whose loss was none of those too high, since it is its update that led to them, and leaves out the
    batches of that step and of the next when it comes there again. A bad step within ``divergence_steps`` of one that
    was left out is at the same place, and ends the run.
    """

    def __init__(self, keeper: Keeper, best: Best, *, first: int, earlier: Earlier | None) -> None:
        self._keeper, self._best, self._asked = keeper, best, endurance_of(keeper.run)
        self._at = first
        events = [] if earlier is None else earlier.events
        self._left_out = {step - 1 for step in left_out_of(events, keeper.model)}
        self._watch = self._watched(events, first)
        if self._left_out:
            self._record()
        if self._asked.on_bad_step == "skip" and keeper.kept is None:
            keeper.keep(0)  # a state to go back to before the first checkpoint is due
        if self._asked.on_bad_step == "skip" and earlier is not None and self._watch.onset is not None:
            keeper.take_over(earlier, max(0, self._watch.onset - 1))  # the run may be about to go back

    def steps(self) -> Iterator[int]:
        """The steps that are to be made, from 0, in their order; after going back, from there again."""
        for leg in self.legs():
            yield from self.along(leg)

    def legs(self) -> Iterator[range]:
        """The same in stretches without a gap; :meth:`along` goes through each."""
        while self._at < self._keeper.steps:
            if self._at in self._left_out:
                self._at += 1
                self._keeper.after(self._at, None)
                continue
            yield range(self._at, min((s for s in self._left_out if s > self._at), default=self._keeper.steps))

    def along(self, leg: range) -> Iterator[int]:
        """The steps of a leg, up to where the run goes back."""
        for step in leg:
            self._at = step + 1
            yield step
            if self._at != step + 1:
                return

    def attempt(self, step: int, make: Callable[[], Made]) -> Made | None:
        """What ``make`` makes of ``step``; None where it was bad and is left out."""
        generators = Generators.now()
        try:
            return make()
        except NotFinite as bad:
            generators.put_back()
            if self._keeper.kept != step:
                self._keeper.keep(step)  # as the model was before it
            self._check_skipping(range(step, step + 1), bad)
            self._keeper.optimiser.forget_gradients()
            self._leave_out(range(step, step + 1), str(bad))
            self._keeper.after(step + 1, None)
            return None

    def went_back(self, step: int, loss: float) -> bool:
        """Take the loss of a step that was made in; whether the run went back, since the loss diverges."""
        diverges, onset = self._watch.feed(step, loss), self._watch.onset
        self._keeper.spare = None if onset is None else max(0, onset - 1)
        if not diverges or onset is None:
            return False
        asked = self._asked
        why = (
            f"from step {onset + 1} on the loss was above {asked.divergence_factor:g} x {self._watch.median:.4g}, the "
            f"median of those before, for {asked.divergence_steps} steps ({loss:.4g} at step {step + 1})"
        )
        diverged = FailedError(
            f"the loss of the {self._keeper.model} diverges: {why}",
            next="lower the learning rate, or look at the data and targets of this step",
        )
        guilty = range(max(0, onset - 1), onset + 1)
        self._check_skipping(guilty, diverged)
        found = self._keeper.go_back(guilty.start)
        if found is None:
            raise diverged
        self._leave_out(guilty, why)
        self._best.go_back(found)
        self._watch = self._watched(read_events(self._keeper.run.events_file), found)
        self._at = found
        return True

    def _check_skipping(self, steps: range, error: FailedError) -> None:
        """Raise ``error`` where bad steps end the run."""
        if self._asked.on_bad_step == "stop":
            raise error
        near = [one for one in self._left_out if 0 <= steps.start - one <= self._asked.divergence_steps]
        if near:
            raise FailedError(
                f"{error}; step {max(near) + 1} was left out before it: the second at one place ends the run",
                next=error.next,
            ) from error

    def _leave_out(self, steps: range, why: str) -> None:
        """Record that the batches of ``steps`` are left out."""
        self._left_out |= set(steps)
        self._record()
        for step in steps:
            say_left_out(self._keeper.log, self._keeper.model, step + 1, why)

    def _record(self) -> None:
        """What was left out is in force: it goes into the run's evidence."""
        run, model = self._keeper.run, self._keeper.model
        known = effective.read(run).get("effective", {}).get("left_out", {})
        effective.record(run, effective={"left_out": known | {model: sorted(step + 1 for step in self._left_out)}})

    def _watched(self, events: Sequence[Event], until: int) -> Watch:
        """A watch that has seen the losses of the steps up to ``until``, as events say them."""
        watch = Watch(self._asked.divergence_factor, self._asked.divergence_steps)
        for step, fields in sorted(steps_of(standing(events), self._keeper.model).items()):
            if step <= until:
                watch.feed(step - 1, float(fields["loss"]))
        return watch
