"""Whether a student trained by an engine on several processes is the one that a single process trains."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from latentforge.kernels.targets import Targets, TopKTargets
from latentforge.spec.fields import Distributed
from latentforge.students.causal import ModelShape, Padding, Student, new_model
from latentforge.train.engines.choice import Parts, engine_of
from latentforge.train.engines.launching import together
from latentforge.train.engines.protocol import Engine
from latentforge.train.engines.single import Single
from latentforge.train.engines.world import World
from latentforge.train.loop import Objective, Trainer
from latentforge.train.optimiser import MasterOptimiser, Updates
from latentforge.train.setting import choose_kernel

ENGINES: tuple[Distributed, ...] = ("ddp", "fsdp2", "deepspeed-zero2", "deepspeed-zero3")
TOLERANCE = 1e-6
"""Of losses and gradient norms, relative, in fp32: sums over rows are made in another order, and nothing else."""

_VOCABULARY, _LENGTH, _EOS = 61, 12, 0
_BATCHES = (8, 8, 5)
"""Rows of each step: two processes cannot share the last one out evenly, and make another number of passes for it."""


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
    resumed: bool = False,
    mutant: str | None = None,
) -> Compared:
    """Three steps of one student by an engine on the processes of this world, beside the same by none on this one.

    Rows are ragged (documents end inside them), and so are the batches. With ``recomputed`` the engine's student
    computes its activations again for the gradient, and that of the single process keeps them. Where it is ``resumed``,
    the engine takes over what the single process kept after its first step. ``mutant`` "divided-twice" leaves the
    library's own average in.
    """
    alone = _trainer("none", micro_batch_size, tied)
    there = _trainer(distributed, micro_batch_size, tied, recomputed)
    if mutant == "divided-twice":
        _divide_twice(there.engine)
    loss = norm = 0.0
    for step, rows in enumerate(_BATCHES):
        tokens = _tokens(step, rows)
        wanted = alone.step(step, tokens, _targets)
        if resumed and step == 0:
            there.optimiser.load(*_kept(alone))
            continue
        found = there.step(step, tokens, _targets)
        loss = max(loss, abs(found.loss - wanted.loss) / abs(wanted.loss))
        norm = max(norm, abs(found.grad_norm - wanted.grad_norm) / wanted.grad_norm)
    # Weights and moments as a checkpoint holds them.
    wanted_kept, ours = ({**weights, **moments} for weights, moments in (_kept(alone), _kept(there)))
    weight = max(float((ours[name] - value).abs().max()) for name, value in wanted_kept.items())
    return Compared(loss, norm, weight, there.engine.wrapped().record())


def compared_here(cases: list[dict[str, Any]]) -> list[list[Any]]:
    """:func:`compared` of each of ``cases``, in a process that :func:`together` has started."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    return [list(compared(**case)) for case in cases]


def equality(cases: list[dict[str, Any]], *, processes: int) -> list[Compared]:
    """The cases on ``processes`` of this host, all in one start of theirs; the furthest of what they found."""
    by_rank = together("latentforge.train.engines.equality:compared_here", {"cases": cases}, processes, threads=1)
    found = []
    for ranks in zip(*by_rank, strict=True):
        each = [Compared(*one) for one in ranks]
        furthest = (max(getattr(one, name) for one in each) for name in ("loss", "norm", "weight"))
        found.append(Compared(*furthest, each[0].wrapped))
    return found


def small_student(*, tied: bool = True) -> Student:
    """Always the same start; rows and heads that two processes cannot share out evenly."""
    shape = ModelShape(layers=2, hidden=32, heads=2, kv_heads=1, intermediate=64)
    sizes = {"vocab_size": _VOCABULARY, "positions": _LENGTH, "eos_id": _EOS}
    return Student(new_model(shape, **sizes, seed=3, tied=tied), _VOCABULARY, Padding(4, _EOS))


def _trainer(distributed: Distributed, micro_batch_size: int | None, tied: bool, recomputed: bool = False) -> Trainer:
    student = small_student(tied=tied)
    if recomputed:
        student.checkpoint_activations()
    model = student.model
    parts = Parts(student, model, layers=model.model.layers, methods=("logits",))
    updates = Updates(learning_rate=3e-3, weight_decay=0.1, warmup_steps=1, steps=9, clip_norm=0.5)
    if distributed == "none":  # beside the others, whatever the number of processes
        engine: Engine = Single(student, MasterOptimiser(model, updates))
    else:
        engine = engine_of(distributed, parts, updates, precision=torch.float32)
    kernel, _ = choose_kernel(torch.device("cpu"), torch.float32)
    return Trainer(student, engine, Objective(2.0, 0.3, 0.7, kernel), micro_batch_size=micro_batch_size)


def _kept(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights, moments = trainer.optimiser.weights(), trainer.optimiser.moments()
    return tuple({name: value.detach().clone() for name, value in some.items()} for some in (weights, moments))


def _tokens(step: int, rows: int) -> Tensor:
    """Rows of text that ends, and is padded, at another place in each of their chunks."""
    seed = torch.Generator().manual_seed(step)
    text = torch.randint(1, _VOCABULARY, (rows, _LENGTH), generator=seed)
    ends = torch.rand(rows, _LENGTH, generator=seed) < 0.1
    return text.masked_fill(ends, _EOS)


def _targets(tokens: Tensor) -> Targets:
    """Four entries a row and the mass of the others, a function of the row's own tokens."""
    rows = tokens[:, :-1].reshape(-1, 1)
    ids = (rows + torch.arange(4) * 7) % _VOCABULARY
    logprobs = torch.log_softmax(torch.cos(ids + rows).float(), -1) - 0.25
    tail = torch.log1p(-logprobs.exp().sum(-1))
    return TopKTargets(ids.to(torch.int32), logprobs, tail)


def _divide_twice(engine: Engine) -> None:
    backward, size = engine.backward, World.here().size
    cast(Any, engine).backward = lambda loss: backward(loss / size)
