"""The engine that a run asked for, over a student of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from latentforge.errors import RefusedError
from latentforge.spec.fields import Distributed
from latentforge.students.causal import cast_weights
from latentforge.train.engines.protocol import Engine
from latentforge.train.engines.single import Single
from latentforge.train.engines.world import World
from latentforge.train.optimiser import MasterOptimiser, Updates


@dataclass(frozen=True)
class Parts:
    """A fresh fp32 student as an engine takes it: ``trained`` is the part whose tensors are named in checkpoints,
    ``layers`` what is gathered by itself where weights are sharded (called by every process in every pass),
    ``methods`` what uses weights besides ``forward``; with ``some_unused`` a pass may leave weights out."""

    student: nn.Module
    trained: nn.Module
    layers: Sequence[nn.Module] = ()
    methods: Sequence[str] = ()
    some_unused: bool = False


def engine_of(asked: Distributed, parts: Parts, updates: Updates, *, precision: torch.dtype) -> Engine:
    """The engine ``asked`` over ``parts``, on the processes that this one has joined.

    RefusedError where these are not what the engine is for, or its library is not installed.
    """
    world = World.here()
    if asked == "none":
        if world.size > 1:
            raise RefusedError(f"distributed = 'none' in one of {world.size} processes", next="name an engine")
        cast_weights(parts.trained, precision)
        return Single(parts.student, MasterOptimiser(parts.trained, updates))
    if not any(p.requires_grad for p in parts.trained.parameters()):
        raise RefusedError(f"distributed = {asked!r} with a frozen student: there is nothing to train together")
    if asked == "fsdp2":
        from latentforge.train.engines.fsdp2 import Fsdp2, shard

        # The parameters stay fp32, and are the masters.
        shard(parts.student, parts.layers, precision, parts.methods)
        return Fsdp2(parts.student, MasterOptimiser(parts.trained, updates))
    cast_weights(parts.trained, precision)
    if asked == "ddp":
        from latentforge.train.engines.ddp import Ddp

        optimiser = MasterOptimiser(parts.trained, updates)
        return Ddp(parts.student, optimiser, some_unused=parts.some_unused)
    from latentforge.train.engines.deepspeed import DeepSpeed

    return DeepSpeed(parts.student, parts.trained, updates, stage=2 if asked == "deepspeed-zero2" else 3)
