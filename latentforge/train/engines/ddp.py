"""torch's DistributedDataParallel: every process holds the whole student, and the gradients are summed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from latentforge.train.engines.protocol import Wrapped
from latentforge.train.engines.world import World
from latentforge.train.optimiser import MasterOptimiser

NAME = "ddp"


class Ddp:
    """The engine ``ddp``. ``some_unused``: a pass may leave parameters out, which DDP then has to look for."""

    def __init__(self, student: nn.Module, optimiser: MasterOptimiser, *, some_unused: bool = False) -> None:
        self.world = World.here()
        self.optimiser = optimiser
        # Buffers are functions of the shape (frequencies of positions): nothing has to be sent at each pass.
        self.module = DistributedDataParallel(student, forward_sync_buffers=False, find_unused_parameters=some_unused)
        # Gradients in bf16 are added up in fp32 masters after each pass, so each pass has to have the whole sum.
        self._once = all(p.dtype == torch.float32 for p in optimiser.working.values())

    @property
    def precision(self) -> torch.dtype:
        """That of the weights themselves."""
        return next(p.dtype for p in self.optimiser.working.values())

    def passing(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients are summed over the processes in the last pass alone."""
        return nullcontext() if last or not self._once else self.module.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one pass."""
        (loss * self.world.size).backward()  # DDP averages
        self.optimiser.collect()

    def step(self) -> float:
        """Update alike on every process; the norm of the summed gradient before clipping."""
        return self.optimiser.step()

    def rehearsed(self) -> None:
        """Without a gradient, as before: AdamW makes moments for a tensor that has one, of zero too."""
        self.optimiser.forget_gradients()

    def wrapped(self) -> Wrapped:
        """Everything is on every process."""
        trained = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        states = sum(p.numel() for p in self.optimiser.masters.values())
        found = Wrapped(NAME, type(self.module).__name__, self.world.size, trained, trained, states)
        return found.require(NAME, wrapper="DistributedDataParallel", sharded=False, states_sharded=False, largest=0)
