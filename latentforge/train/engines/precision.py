"""What computes in bf16 under an engine, and whether its fp32 masters take in what bf16 weights would lose."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentforge.spec.fields import Distributed
from latentforge.train.engines.deepspeed import DeepSpeed
from latentforge.train.engines.protocol import Engine
from latentforge.train.engines.small import BATCHES, Distilling, tokens_of, trainer_of
from latentforge.train.optimiser import Updates

UPDATES = Updates(learning_rate=1e-5, weight_decay=0.0, warmup_steps=0, steps=9, clip_norm=0.5)
"""So small that a bf16 weight of usual size stays what it was: a step is less than half of the distance to the next."""

TOLERANCE = 0.1
"""Of the way that all weights went in three steps, as a share of that of one process in bf16. Gradients are rounded to
bf16 over other parts of the batch, and AdamW makes a whole step of one that is near zero, whichever way it points."""


ROUNDED = "rounded-masters"
"""The planted fault: masters that bf16 can hold."""


class Precise(NamedTuple):
    """What was found of an engine in bf16: the dtype of weights in a forward pass, of gradients as they are added up,
    of the masters as a checkpoint reads them; ``finer`` the share of the masters that bf16 does not have; ``off`` how
    far the way of the weights in three steps is from that of one process, as a share of it."""

    computes: str
    gradients: str
    masters: str
    finer: float
    off: float


def precise(distributed: Distributed, *, mutant: str | None = None) -> Precise:
    """Three steps of the small student in bf16 by an engine, beside the same by none, two rows a pass. ``mutant``
    :data:`ROUNDED` rounds the masters after each step."""
    asked: dict[str, Any] = {"precision": torch.bfloat16, "updates": UPDATES}
    ways, seen = [], []
    for name in ("none", distributed):
        trainer = trainer_of(name, 2, **asked)
        assert isinstance(trainer, Distilling)
        projection = trainer.student.model.model.layers[0].self_attn.q_proj
        projection.register_forward_pre_hook(lambda module, given: seen.append(str(module.weight.dtype)))
        gradients = _gradients_of(trainer.engine)
        start = _whole(trainer)
        for step, rows in enumerate(BATCHES):
            trainer.step(step, tokens_of(step, rows))
            if mutant == ROUNDED and name != "none":
                _round_masters(trainer.engine)
        end = _whole(trainer)
        ways.append(torch.cat([(end[key] - start[key]).flatten() for key in sorted(start)]))
    values = torch.cat([value.flatten() for value in end.values()])
    finer = float((values != values.bfloat16().float()).float().mean())
    off = float((ways[1] - ways[0]).norm() / ways[0].norm())
    said = (" ".join(sorted(found)) for found in ({seen[-1]}, gradients, {str(value.dtype) for value in end.values()}))
    return Precise(*(one.replace("torch.", "") for one in said), finer, off)


def _whole(trainer: Distilling) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.optimiser.weights().items()}


def _gradients_of(engine: Engine) -> set[str]:
    """The dtypes of what a step's gradient is added up in, filled before each update."""
    found: set[str] = set()
    update = engine.step

    def step() -> float:
        if isinstance(engine, DeepSpeed):
            groups = engine.module.optimizer.averaged_gradients.values()
            found.update(str(one.dtype) for group in groups for one in group)
        else:
            masters: dict[str, Tensor] = engine.optimiser.masters  # type: ignore[attr-defined]
            found.update(str(one.grad.dtype) for one in masters.values() if one.grad is not None)
        return update()

    engine.step = step  # type: ignore[method-assign]
    return found


@torch.no_grad()
def _round_masters(engine: Engine) -> None:
    masters = engine.optimiser.flats() if isinstance(engine, DeepSpeed) else engine.optimiser.masters.values()  # type: ignore[attr-defined]
    for master in masters:
        master.copy_(master.bfloat16().float())
