"""One process: the student as it is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from latentforge.train.engines.protocol import Wrapped
from latentforge.train.engines.world import World
from latentforge.train.optimiser import MasterOptimiser


class Single:
    """The engine ``none``."""

    def __init__(self, student: nn.Module, optimiser: MasterOptimiser) -> None:
        self.world = World()
        self.module = student
        self.optimiser = optimiser

    @property
    def precision(self) -> torch.dtype:
        """That of the weights themselves."""
        return next(p.dtype for p in self.optimiser.model.parameters())

    def passing(self, *, last: bool) -> AbstractContextManager[None]:
        """Nothing is held back for the last pass."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one pass; there are none where everything is frozen."""
        if loss.requires_grad:
            loss.backward()
            self.optimiser.collect()

    def step(self) -> float:
        """Update; the gradient norm before clipping."""
        return self.optimiser.step()

    def rehearsed(self) -> None:
        """Without a gradient, as before: AdamW makes moments for a tensor that has one, of zero too."""
        self.optimiser.forget_gradients()

    def wrapped(self) -> Wrapped:
        """Everything is here."""
        trained = sum(p.numel() for p in self.optimiser.masters.values())
        return Wrapped("none", type(self.module).__name__, 1, trained, trained, trained)
