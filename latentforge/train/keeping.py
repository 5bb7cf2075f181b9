"""Checkpoints of a run: taken between two steps, written beside the steps that follow, and put back."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from latentforge.data.order import BatchOrder
from latentforge.data.shards import ShardSet
from latentforge.errors import LatentForgeError, RefusedError
from latentforge.events import EventLog
from latentforge.spec.endurance import endurance_of
from latentforge.spec.run import RunDir
from latentforge.train.checkpoint import (
    Checkpoint,
    Position,
    Retention,
    copy_checkpoint,
    drop_after,
    load_checkpoint,
    newest_checkpoint,
    retain,
    save_checkpoint,
    snapshot,
    step_folder,
    steps_in,
)
from latentforge.train.engines.protocol import Optimiser
from latentforge.train.engines.world import World
from latentforge.train.resume import Earlier, carry_events
from latentforge.train.stopping import SHARE, Interrupted, Overdue, stop_requested
from latentforge.verdicts import ExitCode

MIB = 1 << 20


def position_of(data: ShardSet, order: BatchOrder) -> Position:
    """Where a run that trains on ``data`` in ``order`` takes its rows from."""
    return Position(data.record["shards"]["train.bin"], order.seed, order.batch_size)


class _Writing(threading.Thread):
    """One checkpoint on its way to the disk; a daemon, so that a run that has no time left can end without it."""

    def __init__(self, write: Any) -> None:
        super().__init__(name="lf-checkpoint", daemon=True)
        self._write = write
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._write()
        except BaseException as error:
            self.error = error
        finally:
            del self._write  # and with it the snapshot


@dataclass
class Keeper:
    """Keeps the checkpoints of a run that trains one ``model`` for ``steps`` steps, one ``every`` so many, below the
    run's own folder of them.

    A checkpoint is a copy in memory, which a thread writes while the steps go on; the next one waits for it, so that
    there is one copy at most. ``start`` are the digests of the weights before the first step, ``position`` where the
    data comes from. A context: at its end nothing is on its way any more, and a write that failed has been raised, as
    Interrupted is where the run was told to stop meanwhile.
    """

    run: RunDir
    log: EventLog
    trained: nn.Module
    optimiser: Optimiser
    model: str
    start: dict[str, str]
    steps: int
    every: int
    position: Position
    below: str = ""
    _writing: _Writing | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._world = World.here()
        asked = endurance_of(self.run)
        forever = None if asked.keep_nth is None else asked.keep_nth * self.every
        self.retention = Retention(asked.keep_newest, forever)
        self.floor = asked.disk_floor_mib * MIB
        each = self.trained.parameters()
        # DeepSpeed leaves a parameter that lies on other processes without numbers of its own.
        sizes = ((getattr(one, "ds_numel", one.numel()), one) for one in each)
        self._size = sum(size * (12 if one.requires_grad else one.element_size()) for size, one in sizes)
        self.kept: int | None = None
        """The step of the newest checkpoint that was taken."""
        self.spare: int | None = None
        """The newest checkpoint of at most so many steps stays, since the run may have to go back to it."""

        if self._lacks_room():
            begun = bool(steps_in(self.run.checkpoints))
            raise LatentForgeError(
                f"{self._room() / MIB:.0f} MiB are free for {self.run.run}: a checkpoint of the {self.model} takes "
                f"{self._size / MIB:.0f}, and endurance.disk_floor_mib = {self.floor / MIB:.0f} are to stay free",
                next="make room, then go on from what was made:  latentforge dispatch go --attempt next"
                if begun
                else "make room, or lower endurance.disk_floor_mib",
                code=ExitCode.UNKNOWN if begun else ExitCode.REFUSED,
            )

    @property
    def folder(self) -> Path:
        """Where its checkpoints lie."""
        return self.run.checkpoints / self.below

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(value, Overdue) and self._writing is not None:
            self._writing.join((1.0 - SHARE) / 2 * endurance_of(self.run).stop_grace)
            return
        try:
            self.settle()
        except Exception as error:
            if value is None:
                raise
            self.log.warning(f"while the run was ending: {error}")
        if value is None and self._world.first:
            # Whoever was killed between a checkpoint's name and the end of an older one left both.
            retain(self.folder, self.retention, spare=self.spare)
        # One that came after the last step was asked about, while its checkpoint was written.
        if value is None and (signal := self._world.signal(stop_requested())) is not None:
            raise Interrupted(f"interrupted by {signal} after the last step of the {self.model}; checkpoint written")

    def resume(self, earlier: Earlier | None) -> int | None:
        """Go on from the last checkpoint of the predecessor, and keep it as this run's first, or of this run where it
        was begun before: how many steps were made. None where there is none, and the run starts from step 0."""
        self._world.barrier()  # all of them have read what was left, before the first writes over it
        if earlier is None:
            return None
        checkpoint = load_checkpoint(earlier.path)
        self._world.barrier()
        self._go_on(earlier, checkpoint)
        if earlier.run == self.run.run:
            self.kept = checkpoint.step
            if self._world.first:
                drop_after(self.folder, checkpoint.step)
        else:
            self.keep(checkpoint.step)
        return checkpoint.step

    def after(self, step: int, signal: str | None) -> None:
        """After ``step`` steps: a checkpoint where one is due, or where ``signal`` asks to stop: then Interrupted. What
        became of the one before is raised here where it failed."""
        if self._writing is not None and not self._writing.is_alive():
            self.settle()
        if signal is not None or step % self.every == 0 or step == self.steps:
            self.keep(step)
        elif self._world.any(self._lacks_room()):
            self._stop_for_room(step)
        if signal is not None:
            self.settle()
            self._world.barrier()  # the run has ended when what the first process writes is whole
            raise Interrupted(f"interrupted by {signal} after step {step} of the {self.model}; checkpoint written")

    def _stop_for_room(self, step: int) -> None:
        """End the run while the room that it kept free still takes what is left to be written."""
        room = self._room()
        # What the first finds on its disk is what all do: a checkpoint is gathered by all of them.
        if self._world.any(self._world.first and room > self._size):
            self.keep(step)
            self.settle()
        elif self._writing is not None:
            self.settle()
        raise LatentForgeError(
            f"{room / MIB:.0f} MiB are left on the run's disk: a checkpoint takes {self._size / MIB:.0f}, and "
            f"endurance.disk_floor_mib = {self.floor / MIB:.0f} are to stay free; stopped after step {step} of the "
            f"{self.model}, the last checkpoint is of step {self.kept}",
            next="make room, then go on from it:  latentforge dispatch go --attempt next",
            code=ExitCode.UNKNOWN,
        )

    def _lacks_room(self) -> bool:
        """Whether the next checkpoint would take what is to stay free; not known while one is being written, after
        which older ones go. Those that write none need no room: they may be on another host."""
        return self._world.first and self._writing is None and self._room() < self.floor + self._size

    def _room(self) -> int:
        found = os.statvfs(self.run.path)
        return found.f_bavail * found.f_frsize

    def keep(self, step: int, below: str = "") -> None:
        """Take the checkpoint of ``step`` steps, for the folder ``below`` this one's, and go on while it is written."""
        began = time.monotonic()
        self.settle()
        weights, moments = self.optimiser.each_weight(), self.optimiser.each_moment()
        if not below:
            self.kept = step
        if not self._world.first:
            for _tensor in chain(weights, moments):  # gathered together, and let go at once
                pass
            return
        taken = snapshot(self.model, step, weights, moments, self.position)
        stood, folder = time.monotonic() - began, self.folder / below
        self._writing = _Writing(lambda: self._write(taken, folder, stood))

    def go_back(self, step: int) -> int | None:
        """Put back the newest whole checkpoint of at most ``step`` steps, and forget those after it: of how many it is.
        None, with nothing changed, where there is none."""
        self.settle()
        found, _said = newest_checkpoint(self.folder, until=step)
        if found is None:
            return None
        self.optimiser.load(found.weights, found.moments)
        found.rng.put_back()
        drop_after(self.folder, found.step)
        self.kept, self.spare = found.step, None
        self.log.emit("phase", name="rollback", state="end", model=self.model, step=found.step)
        return found.step

    def take_over(self, earlier: Earlier, step: int) -> None:
        """Have a checkpoint of at most ``step`` steps to go back to: a predecessor's newest one, where there is none
        here. It stays as :attr:`spare` says."""
        self.spare = step
        self.settle()
        if earlier.run != self.run.run and not [one for one in steps_in(self.folder) if one <= step]:
            found, _said = newest_checkpoint(earlier.path.parent, until=step)
            if found is not None and self._world.first:
                copy_checkpoint(step_folder(earlier.path.parent, found.step), self.folder)
        self._world.barrier()

    def settle(self) -> None:
        """Wait for the checkpoint that is on its way; what made it fail is raised."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.join()
        if writing.error is not None:
            raise writing.error

    def _write(self, taken: Checkpoint, folder: Path, stood: float) -> None:
        began = time.monotonic()
        retention = self.retention if folder == self.folder else Retention()
        written = save_checkpoint(folder, taken, start=self.start, retention=retention, spare=self.spare)
        self.log.checkpoint(
            written.step,
            path=written.path.relative_to(self.run.path).as_posix(),
            bytes=written.bytes,
            expected_bytes=written.expected_bytes,
            model=self.model,
            moved=written.moved,
            tensors=written.trained,
            unmoved=list(written.unmoved),
            seconds=round(time.monotonic() - began, 3),
            stood_seconds=round(stood, 3),
        )
        if written.unmoved and written.step > 0:
            self.log.warning(f"{len(written.unmoved)} of {written.trained} tensors of the {self.model} have not moved")

    def _go_on(self, earlier: Earlier, checkpoint: Checkpoint) -> None:
        """Put back a predecessor's checkpoint (weights, moments, generator state), carry its events, say so."""
        if checkpoint.position != self.position:
            raise RefusedError(
                f"the {self.model}'s checkpoint of step {checkpoint.step} of {earlier.run} goes on with "
                f"{checkpoint.position}; this run has {self.position}",
                next="start a run of its own on this data:  latentforge dispatch go",
            )
        if earlier.run != self.run.run:
            carry_events(earlier, self.model, until=checkpoint.step, before=self.steps, log=self.log)
        self.optimiser.load(checkpoint.weights, checkpoint.moments)
        checkpoint.rng.put_back()
        if checkpoint.rng.elsewhere:
            holds, draws = ("none", "from one") if checkpoint.rng.cuda is None else ("one", "from none")
            self.log.warning(
                f"of a GPU's generator the checkpoint holds {holds}, and this run draws {draws}: its steps may not "
                "repeat bit for bit"
            )
        if checkpoint.threads != torch.get_num_threads():
            self.log.warning(
                f"the checkpoint was computed with {checkpoint.threads} threads, this run has "
                f"{torch.get_num_threads()}: its steps may not repeat bit for bit"
            )
        of = {"model": self.model, "step": checkpoint.step, "steps": self.steps, "predecessor": earlier.run}
        self.log.emit("phase", name="resume", state="end", **of)
        self.log.say(f"{self.model} resumes from step {checkpoint.step} of {earlier.run}")
