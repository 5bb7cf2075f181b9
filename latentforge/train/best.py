"""The step of the lowest held-out loss: kept beside the checkpoints, and put back at the end where that was asked."""

from __future__ import annotations

import math
import shutil

from torch import Tensor

from latentforge.errors import FailedError
from latentforge.spec.run import RunDir
from latentforge.train.checkpoint import drop_after, load_checkpoint, newest_checkpoint, step_folder
from latentforge.train.engines.world import World
from latentforge.train.keeping import Keeper
from latentforge.train.reading import KEPT_STEP
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
        last = None if earlier is None else earlier.checkpoints.get(self._keeper.model)
        if earlier is None or last is None or not self.wanted:
            return
        first = World.here().first
        if earlier.run == self._keeper.run.run and first:
            drop_after(self._folder, min(last.step, self._keeper.steps - 1))
        theirs = RunDir(self._keeper.run.path.parent / earlier.run)
        before = theirs.checkpoints / self._keeper.below / BELOW
        found, said = newest_checkpoint(before, until=min(last.step, self._keeper.steps - 1))
        for sentence in said:
            self._keeper.log.warning(f"{earlier.run}, {BELOW}: {sentence}")
        if found is not None:
            if before != self._folder and first:
                shutil.copytree(step_folder(before, found.step), step_folder(self._folder, found.step))
            self.step = found.step
            self.loss = self._before[found.step] = _loss(earlier, self._keeper.model, found.step)

    def due(self, step: int) -> bool:
        """Whether held-out text is to be measured after ``step`` steps; after the last it is in any case."""
        return self._every is not None and step % self._every == 0 and step < self._keeper.steps

    def offer(self, step: int, loss: float) -> None:
        """Keep the weights as they are after ``step`` steps if their held-out ``loss`` is the lowest so far."""
        if self.wanted and loss < self.loss:
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
        of = {"step": steps, "split": "heldout", "model": self._keeper.model}
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
    for event in earlier.events:
        said = event.fields
        if event.kind == "metric" and (said["name"], said.get("model"), said["step"]) == ("val_loss", model, step):
            return float(said["value"])
    raise FailedError(f"{earlier.run} kept step {step} as its best, and its events do not say at what loss")
