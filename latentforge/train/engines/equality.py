"""Whether a student trained by an engine on several processes is the one that a single process trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
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
    alone = trainer_of("none", micro_batch_size, tied=tied, codec=codec)
    there = trainer_of(distributed, micro_batch_size, tied=tied, codec=codec, recomputed=recomputed)
    if rehearsed:
        there.rehearse(tokens_of(0, BATCHES[0]))
    if mutant == "divided-twice":
        _divide_twice(there.engine)
    loss = norm = 0.0
    for step, rows in enumerate(BATCHES):
        tokens = tokens_of(step, rows)
        wanted = alone.step(step, tokens)
        found = there.step(step, tokens)
        loss = worse(loss, abs(found.loss - wanted.loss) / abs(wanted.loss))
        norm = worse(norm, abs(found.grad_norm - wanted.grad_norm) / wanted.grad_norm)
    # Weights and moments as a checkpoint holds them.
    wanted_kept, ours = ({**weights, **moments} for weights, moments in (_kept(alone), _kept(there)))
    weight = reduce(worse, (float((ours[name] - value).abs().max()) for name, value in wanted_kept.items()))
    return Compared(loss, norm, weight, there.engine.wrapped().record())


def furthest(of_ranks: Iterable[Sequence[Any]]) -> Compared:
    """The furthest that any of the processes found."""
    each = [Compared(*one) for one in of_ranks]
    found = (reduce(worse, (getattr(one, name) for one in each)) for name in ("loss", "norm", "weight"))
    return Compared(*found, each[0].wrapped)


def _kept(trainer: Distilling | Coding) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights, moments = trainer.optimiser.weights(), trainer.optimiser.moments()
    return tuple({name: value.detach().clone() for name, value in some.items()} for some in (weights, moments))


def _divide_twice(engine: Engine) -> None:
    backward, size = engine.backward, World.here().size
    cast(Any, engine).backward = lambda loss: backward(loss / size)
