"""The step of the lowest held-out loss: kept beside the checkpoints, and put back at the end where that was asked."""

from __future__ import annotations

import math

from torch import Tensor

from latentforge.errors import FailedError
from latentforge.events import KEPT_STEP, standing
from latentforge.train.checkpoint import (
    copy_checkpoint,
    drop_after,
    load_checkpoint,
    newest_checkpoint,
    step_folder,
    steps_in,
)
from latentforge.train.engines.world import World
from latentforge.train.keeping import Keeper
from latentforge.train.reading import heldout_metric
from latentforge.train.resume import Earlier

BELOW = "best"


class Best:
    """The checkpoint of the lowest held-out loss so far, in ``best`` below the keeper's folder; ``step`` None before
    the first.

    Of equal losses the first is kept; one that is no number is never the lowest. Where it is not ``wanted``, nothing is
    kept; held-out text is measured ``every`` so many steps all the same.
    """

    def __init__(self, keeper: Keeper, *, wanted: bool, every: int | None) -> None:
        self.wanted = wanted
        self._every = every
        self._keeper = keeper
        self._folder = keeper.folder / BELOW
        self.step: int | None = None
        self.loss = math.inf
        self._before: dict[int, float] = {}

    def carry(self, earlier: Earlier | None) -> None:
        """Take over a predecessor's best up to its last checkpoint, before this run writes one of its own: whoever goes
        on from that finds the best as well. What came later is measured again, as the last step's is in any case."""
        if not self.wanted:
            return
        own = earlier is not None and earlier.run == self._keeper.run.run
        until = -1 if earlier is None else min(earlier.step, self._keeper.steps - 1)
        first = World.here().first
        if first:
            drop_after(self._folder, until if own else -1)
        if earlier is None:
            return
        before = earlier.path.parent / BELOW
        found, said = newest_checkpoint(before, until=until)
        for sentence in said:
            self._keeper.log.warning(f"{earlier.run}, {BELOW}: {sentence}")
        if found is None:
            return
        if first and not own:
            copy_checkpoint(step_folder(before, found.step), self._folder)
        for step in steps_in(before):
            if step <= found.step:
                self._before[step] = _loss(earlier, self._keeper.model, step)
        self.step, self.loss = found.step, self._before[found.step]

    def due(self, step: int) -> bool:
        """Whether held-out text is to be measured after ``step`` steps; after the last it is in any case."""
        return self._every is not None and step % self._every == 0 and step < self._keeper.steps

    def offer(self, step: int, loss: float) -> None:
        """Keep the weights as they are after ``step`` steps if their held-out ``loss`` is the lowest so far: that of
        the first process, for all of them, who gather them together."""
        if not self.wanted:
            return
        world = World.here()
        (loss,) = world.sums(loss if world.first else 0.0)
        if loss < self.loss:
            self._before[step] = loss
            self.step, self.loss = step, loss
            self._keeper.keep(step, BELOW)

    def go_back(self, step: int) -> None:
        """Forget what was the best after ``step`` steps: these are made again."""
        drop_after(self._folder, step)
        found, _said = newest_checkpoint(self._folder)
        self.step = None if found is None else found.step
        self.loss = math.inf if found is None else self._before[found.step]

    def put_back(self, steps: int, loss: float) -> int:
        """Whose weights the model holds from now on: of the best step, the last one, ``steps`` with ``loss``, included.

        FailedError where no held-out loss was a number. Where it is not wanted, nothing changes.
        """
        if not self.wanted:
            return steps
        self.offer(steps, loss)
        if self.step is None:
            raise FailedError(
                f"no held-out loss of the {self._keeper.model} was a number: no step is the best",
                next="train with a lower learning rate",
            )
        self._keeper.settle()
        self._keeper.optimiser.load(*self._read(self.step))
        log = self._keeper.log
        of = {"step": steps, "model": self._keeper.model}
        log.emit("metric", name=KEPT_STEP, value=self.step, kept_loss=self.loss, last_loss=loss, **of)
        log.say(f"kept: step {self.step}, held-out loss {self.loss:.4f}; that of step {steps}, the last, is {loss:.4f}")
        return self.step

    def _read(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and moments of the checkpoint of ``step``, which lies on the disk of the first process alone."""
        world = World.here()
        world.barrier()
        if world.one_disk or world.first:
            found = load_checkpoint(step_folder(self._folder, step))
            parts = found.weights, found.moments
        else:
            parts = None, None
        return parts if world.one_disk else (world.given(parts[0]), world.given(parts[1]))


def _loss(earlier: Earlier, model: str, step: int) -> float:
    found = [value for at, value in heldout_metric(standing(earlier.events), "val_loss", model) if at == step]
    if not found:
        raise FailedError(f"{earlier.run} kept step {step} as its best, and its events do not say at what loss")
    return found[-1]
