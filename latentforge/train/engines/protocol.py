"""What a trainer asks of the library that spreads a student over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from latentforge.errors import FailedError
from latentforge.train.engines.world import World


class Optimiser(Protocol):
    """AdamW over fp32 masters: its schedule, and its state as whole tensors, wherever their parts lie."""

    clip_norm: float | None

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate that the schedule scales, as the optimiser holds it."""
        ...

    @property
    def weight_decay(self) -> float:
        """The weight decay of matrices, as the optimiser holds it."""
        ...

    def set_learning_rate(self, step: int) -> float:
        """Set the schedule's value of ``step`` (from 0) and return what the optimiser now holds."""
        ...

    def each_weight(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters by name, whole, trained ones as fp32 masters: each is gathered when its turn comes, so that
        who keeps none holds one at a time. Collective: all go through it to its end."""
        ...

    def each_moment(self) -> Iterator[tuple[str, Tensor]]:
        """AdamW's state in the same way: ``<parameter>/exp_avg``, ``/exp_avg_sq``, ``/step``. Collective."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Those of :meth:`each_weight`, all at once. Collective."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """Those of :meth:`each_moment`, all at once. Collective."""
        ...

    def forget_gradients(self) -> None:
        """Drop what was added up of a step that is not made."""
        ...

    def load(self, masters: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Put back what :meth:`weights` and :meth:`moments` gave, bit for bit, under any engine. Collective."""
        ...


@dataclass(frozen=True)
class Wrapped:
    """What an engine really made of a student, read from its objects: libraries are known to fall back in silence.

    ``wrapper`` is the type that the passes go through; of the trained ``parameters`` this process keeps ``weights``
    between two steps, and ``states`` in its optimiser (fp32 masters, or the weights themselves where they are fp32).
    """

    engine: str
    wrapper: str
    processes: int
    parameters: int
    weights: int
    states: int

    def record(self) -> dict[str, Any]:
        """As ``effective.json`` says it."""
        return asdict(self)

    def require(self, engine: str, *, wrapper: str, sharded: bool, states_sharded: bool, largest: int) -> Wrapped:
        """FailedError where this is another engine's work than ``engine``'s, or a share is larger than an even one by
        more than ``largest`` numbers (padding)."""
        for what, held, split in (("weights", self.weights, sharded), ("states", self.states, states_sharded)):
            wanted = -(-self.parameters // self.processes) + largest if split else self.parameters
            if held > wanted or (not split and held < wanted):
                raise FailedError(
                    f"distributed = {engine!r}: this process of {self.processes} holds {held} numbers of the {what}, "
                    f"and {'at most ' if split else ''}{wanted} of {self.parameters} are its own"
                )
        if self.wrapper != wrapper or self.engine != engine:
            raise FailedError(
                f"distributed = {engine!r} made {self.engine} with {self.wrapper}, and {wrapper} was asked"
            )
        return self


def at_first(world: World, each: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """What is gathered one after the other, kept by the first process, which writes; the others help to gather it, and
    keep none. Collective."""
    if world.first:
        return dict(each)
    for _tensor in each:
        pass
    return {}


class Engine(Protocol):
    """A student on all processes of a run, with what trains it.

    ``module`` is what a pass goes through; ``student`` what it was made of, and on one process the same. Losses are
    divided by the whole step's denominator before they come here, over all processes: the engine multiplies by the
    number of processes where its library averages, so that nothing is divided twice.
    """

    world: World
    module: nn.Module
    optimiser: Optimiser

    @property
    def precision(self) -> torch.dtype:
        """In what passes compute: fp32, or bf16 beside fp32 masters."""
        ...

    def passing(self, *, last: bool) -> AbstractContextManager[None]:
        """Around one pass, forward and backward; ``last`` of this step's."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one pass. Collective, as the pass itself is."""
        ...

    def step(self) -> float:
        """Clip, update, clear the gradients; the norm of the whole gradient before clipping. Collective."""
        ...

    def rehearsed(self) -> None:
        """After passes whose gradients were all zero, and before any step: as if they had not been made."""
        ...

    def wrapped(self) -> Wrapped:
        """What there really is; FailedError where that is not what was asked."""
        ...
