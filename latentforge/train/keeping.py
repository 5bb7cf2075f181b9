"""Checkpoints of a run: written with what the log says of them, and put back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from latentforge.events import EventLog
from latentforge.spec.run import RunDir
from latentforge.train.checkpoint import Checkpoint, save_checkpoint
from latentforge.train.optimiser import MasterOptimiser
from latentforge.train.resume import Earlier, carry_events
from latentforge.train.stopping import Interrupted


def keep_checkpoint(
    run: RunDir,
    log: EventLog,
    below: str,
    trained: nn.Module,
    optimiser: MasterOptimiser,
    *,
    model: str,
    step: int,
    start: dict[str, str],
) -> None:
    """Write a checkpoint of ``model`` into the folder ``below``, and say what it weighs and what has moved."""
    weights = {**dict(trained.named_parameters()), **optimiser.masters}
    checkpoint = Checkpoint(model, step, weights, optimiser.moments(), torch.get_rng_state(), torch.get_num_threads())
    written = save_checkpoint(run.checkpoints / below, checkpoint, start=start)
    log.checkpoint(
        step,
        path=written.path.relative_to(run.path).as_posix(),
        bytes=written.bytes,
        expected_bytes=written.expected_bytes,
        model=model,
        moved=written.moved,
        tensors=written.trained,
        unmoved=list(written.unmoved),
    )
    if written.unmoved and step > 0:
        log.warning(f"{len(written.unmoved)} of {written.trained} tensors of the {model} have not moved")


def go_on(
    earlier: Earlier, checkpoint: Checkpoint, optimiser: MasterOptimiser, log: EventLog, *, model: str, steps: int
) -> None:
    """Put back a predecessor's checkpoint of ``model`` (weights, moments, generator state), carry its events, say so.

    ``steps`` are those of the whole run: held-out values of the last one are measured again.
    """
    carry_events(earlier, model, until=checkpoint.step, before=steps, log=log)
    optimiser.load(checkpoint.weights, checkpoint.moments)
    torch.set_rng_state(checkpoint.rng)
    if checkpoint.threads != torch.get_num_threads():
        log.warning(
            f"the checkpoint was computed with {checkpoint.threads} threads, this run has {torch.get_num_threads()}: "
            "its steps may not repeat bit for bit"
        )
    log.emit("phase", name="resume", state="end", model=model, step=checkpoint.step, predecessor=earlier.run)
    log.say(f"{model} resumes from step {checkpoint.step} of {earlier.run}")


@dataclass(frozen=True)
class Keeper:
    """Keeps the checkpoints of a run that trains one ``model`` for ``steps`` steps, one ``every`` so many;
    ``start`` are the digests of its weights before the first."""

    run: RunDir
    log: EventLog
    trained: nn.Module
    optimiser: MasterOptimiser
    model: str
    start: dict[str, str]
    steps: int
    every: int

    def resume(self, earlier: Earlier | None) -> int | None:
        """Go on from the predecessor's last checkpoint, and keep it as this run's first: how many steps were made. None
        where the run starts from step 0, which is said where there was a predecessor."""
        if earlier is None:
            return None
        checkpoint = earlier.checkpoints.get(self.model)
        if checkpoint is None:
            self.log.warning(f"{earlier.run} left no checkpoint that is whole: starting from step 0")
            return None
        go_on(earlier, checkpoint, self.optimiser, self.log, model=self.model, steps=self.steps)
        self.keep(checkpoint.step)
        return checkpoint.step

    def after(self, step: int, signal: str | None) -> None:
        """After ``step`` steps: a checkpoint where one is due, or where ``signal`` asks to stop: then Interrupted."""
        if signal is not None or step % self.every == 0 or step == self.steps:
            self.keep(step)
        if signal is not None:
            raise Interrupted(f"interrupted by {signal} after step {step} of the {self.model}; checkpoint written")

    def keep(self, step: int, below: str = "") -> None:
        """Write the checkpoint of ``step`` steps into the folder ``below``."""
        keep_checkpoint(
            self.run, self.log, below, self.trained, self.optimiser, model=self.model, step=step, start=self.start
        )
