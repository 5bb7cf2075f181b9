"""The student and the codec by which engines are compared: one start, and rows whose text ends inside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentforge.kernels.targets import Targets, TopKTargets
from latentforge.spec.fields import Distributed
from latentforge.students.causal import ModelShape, Padding, Student, cast_weights, new_model
from latentforge.students.latent.codec import CodecShape, new_codec
from latentforge.students.latent.codec_loss import CodecObjective, CodecTraining
from latentforge.train.codec_trainer import CodecTrainer
from latentforge.train.engines.choice import Parts, engine_of
from latentforge.train.engines.protocol import Engine
from latentforge.train.engines.single import Single
from latentforge.train.loop import Objective, StepResult, Trainer, rehearse
from latentforge.train.optimiser import MasterOptimiser, Updates
from latentforge.train.setting import choose_kernel

BATCHES = (8, 8, 5)
"""Rows of each step: two processes cannot share the last one out evenly, and make another number of passes for it."""

UPDATES = Updates(learning_rate=3e-3, weight_decay=0.1, warmup_steps=1, steps=9, clip_norm=0.5)
_VOCABULARY, _LENGTH, _EOS = 61, 12, 0


def small_student(*, tied: bool = True) -> Student:
    """Always the same start; rows and heads that two processes cannot share out evenly."""
    shape = ModelShape(layers=2, hidden=32, heads=2, kv_heads=1, intermediate=64)
    sizes = {"vocab_size": _VOCABULARY, "positions": _LENGTH, "eos_id": _EOS}
    return Student(new_model(shape, **sizes, seed=3, tied=tied), _VOCABULARY, Padding(4, _EOS))


class Distilling(Trainer):
    """A student with its teacher."""

    def step(self, step: int, tokens: Tensor, targets_of: Any = None) -> StepResult:
        return super().step(step, tokens, _targets)

    def rehearse(self, tokens: Tensor) -> None:
        rehearse(self, tokens, _targets)


class Coding(CodecTrainer):
    """A codec, whose step is told as a student's."""

    def step(self, step: int, tokens: Tensor) -> Any:
        return super().step(step, tokens).result


def trainer_of(
    distributed: Distributed,
    micro_batch_size: int | None,
    *,
    tied: bool = True,
    recomputed: bool = False,
    codec: bool = False,
    precision: torch.dtype = torch.float32,
    updates: Updates = UPDATES,
) -> Distilling | Coding:
    """A trainer of the student, or of the ``codec``, under an engine; "none" is on this process alone, whatever the
    number of those beside it."""
    kernel, _ = choose_kernel(torch.device("cpu"), precision)
    if codec:
        objective = CodecObjective(0.15, 0.15, 0.001, 0.5, kernel)
        shape = CodecShape(_VOCABULARY, chunk=4, latent=10, width=15, inner=33)
        plain, coding = new_codec(shape, seed=3), CodecTraining(new_codec(shape, seed=3), objective)
        engine = _engine(distributed, Parts(coding, coding.codec, layers=coding.layers()), updates, precision)
        return Coding(coding, engine, plain, eos_id=_EOS, seed=5, micro_batch_size=micro_batch_size)
    student = small_student(tied=tied)
    if recomputed:
        student.checkpoint_activations()
    model = student.model
    parts = Parts(student, model, layers=model.model.layers, methods=("logits",))
    engine = _engine(distributed, parts, updates, precision)
    return Distilling(student, engine, Objective(2.0, 0.3, 0.7, kernel), micro_batch_size=micro_batch_size)


def _engine(distributed: Distributed, parts: Parts, updates: Updates, precision: torch.dtype) -> Engine:
    if distributed == "none":
        cast_weights(parts.trained, precision)
        return Single(parts.student, MasterOptimiser(parts.trained, updates))
    return engine_of(distributed, parts, updates, precision=precision)


def tokens_of(step: int, rows: int) -> Tensor:
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
