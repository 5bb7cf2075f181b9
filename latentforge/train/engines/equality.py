"""Whether a student trained by an engine on several processes is the one that a single process trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, reduce
from typing import Any, NamedTuple, cast

from torch import Tensor

from latentforge.contracts.finding import worse
from latentforge.spec.fields import Distributed
from latentforge.train.engines.protocol import Engine
from latentforge.train.engines.small import BATCHES, Coding, Distilling, tokens_of, trainer_of
from latentforge.train.engines.world import World

ENGINES: tuple[Distributed, ...] = ("ddp", "fsdp2", "deepspeed-zero2", "deepspeed-zero3")
TOLERANCE = 1e-6
"""Of losses and gradient norms, relative, in fp32: sums over rows are made in another order, and nothing else."""


class Alone(NamedTuple):
    """What a single process makes: the loss and the gradient norm of each step, the weights and moments after them."""

    steps: tuple[tuple[float, float], ...]
    kept: dict[str, Tensor]


class Compared(NamedTuple):
    """The furthest that a loss, a gradient norm (both relative) and a weight or moment were from those of a single
    process, and what the engine had wrapped."""

    loss: float
    norm: float
    weight: float
    wrapped: dict[str, Any]


def compared(
    distributed: Distributed,
    *,
    micro_batch_size: int | None,
    tied: bool = True,
    recomputed: bool = False,
    codec: bool = False,
    rehearsed: bool = False,
    mutant: str | None = None,
) -> Compared:
    """Three steps of one student by an engine on the processes of this world, beside the same by none on this one.

    Rows are ragged (documents end inside them), and so are the batches. With ``recomputed`` the engine's student
    computes its activations again for the gradient, and that of the single process keeps them. Of a ``codec`` instead
    the chunks are padded. Where it is ``rehearsed``, the engine has made passes that change nothing before its first
    step. ``mutant`` "divided-twice" leaves the library's own average in.
    """
    alone = _alone(micro_batch_size, tied, codec)
    there = trainer_of(distributed, micro_batch_size, tied=tied, codec=codec, recomputed=recomputed)
    if rehearsed:
        there.rehearse(tokens_of(0, BATCHES[0]))
    if mutant == "divided-twice":
        _divide_twice(there.engine)
    loss = norm = 0.0
    for step, (wanted_loss, wanted_norm) in enumerate(alone.steps):
        found = there.step(step, tokens_of(step, BATCHES[step]))
        loss = worse(loss, abs(found.loss - wanted_loss) / abs(wanted_loss))
        norm = worse(norm, abs(found.grad_norm - wanted_norm) / wanted_norm)
    ours = _kept(there)
    weight = reduce(worse, (float((ours[name] - value).abs().max()) for name, value in alone.kept.items()))
    return Compared(loss, norm, weight, there.engine.wrapped().record())


def furthest(of_ranks: Iterable[Sequence[Any]]) -> Compared:
    """The furthest that any of the processes found."""
    each = [Compared(*one) for one in of_ranks]
    found = (reduce(worse, (getattr(one, name) for one in each)) for name in ("loss", "norm", "weight"))
    return Compared(*found, each[0].wrapped)


@cache
def _alone(micro_batch_size: int | None, tied: bool, codec: bool) -> Alone:
    """Made once a process: it is the same beside every engine."""
    trainer = trainer_of("none", micro_batch_size, tied=tied, codec=codec)
    made = [trainer.step(step, tokens_of(step, rows)) for step, rows in enumerate(BATCHES)]
    return Alone(tuple((one.loss, one.grad_norm) for one in made), _kept(trainer))


def _kept(trainer: Distilling | Coding) -> dict[str, Tensor]:
    """Weights and moments as a checkpoint holds them."""
    both = {**trainer.optimiser.weights(), **trainer.optimiser.moments()}
    return {name: value.detach().clone() for name, value in both.items()}


def _divide_twice(engine: Engine) -> None:
    backward, size = engine.backward, World.here().size
    cast(Any, engine).backward = lambda loss: backward(loss / size)
