"""Executable checks of ``distill.compile``; contracts name these functions and plant their faults."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from latentforge.contracts.finding import Finding
from latentforge.errors import FailedError
from latentforge.kernels.targets import Targets, TopKTargets
from latentforge.students.causal import ModelShape, Student, new_model
from latentforge.train.assembly import layers_of
from latentforge.train.compiled import CompiledLayers
from latentforge.train.engines.single import Single
from latentforge.train.loop import Objective, Trainer
from latentforge.train.optimiser import MasterOptimiser, Updates
from latentforge.train.setting import choose_kernel

TOLERANCE = 1e-6
"""Of losses and gradient norms, relative, in fp32: sums are made in another order, and nothing else."""

STEPS = 3
_VOCABULARY, _ROWS, _LENGTH = 61, 8, 12


def compiled_steps_equal_plain_ones(*, mutant: str | None = None) -> Finding:
    """Three steps through compiled layers beside the same without; ``mutant`` "other-epsilon" computes the norms of
    the layers beside them with another epsilon, as a rewritten layer may."""
    compiled = _compiled_steps()
    plain = _steps(_trainer(compiled=False, epsilon=1e-3 if mutant == "other-epsilon" else None))
    loss, norm = (max(abs(a[i] - b[i]) / abs(b[i]) for a, b in zip(compiled, plain, strict=True)) for i in (0, 1))
    text = f"{STEPS} steps: loss off by {loss:.1e}, gradient norm by {norm:.1e}"
    return Finding(max(loss, norm) <= TOLERANCE, text, {"loss": loss, "grad_norm": norm})


def a_pass_that_did_not_run_compiled_is_refused(*, mutant: str | None = None) -> Finding:
    """Every layer of every pass ran compiled, by count; ``mutant`` "switched-off" lets torch.compile do nothing, as an
    environment variable does without a word."""
    if mutant == "switched-off":
        with _switched_off():
            trainer = _trainer(compiled=True)
            try:
                _steps(trainer)
            except FailedError as error:
                return Finding(False, str(error), {})
    else:
        trainer = _compiled_trainer()
        _compiled_steps()
    assert trainer.compiled is not None
    record = trainer.compiled.record()
    wanted = STEPS * trainer.compiled.layers
    text = f"{record['runs']} of {wanted} layers ran compiled, {record['graphs']} graph, 0 breaks"
    return Finding(record["runs"] == wanted and record["graphs"] == 1, text, dict(record))


@cache
def _compiled_trainer() -> Trainer:
    return _trainer(compiled=True)


@cache
def _compiled_steps() -> list[tuple[float, float]]:
    """Both checks look at one compilation, which takes half a minute of computing."""
    return _steps(_compiled_trainer())


def _steps(trainer: Trainer) -> list[tuple[float, float]]:
    found = [trainer.step(step, _tokens(step), _targets) for step in range(STEPS)]
    return [(one.loss, one.grad_norm) for one in found]


def _trainer(*, compiled: bool, epsilon: float | None = None) -> Trainer:
    shape = ModelShape(layers=2, hidden=32, heads=2, kv_heads=1, intermediate=64)
    model = new_model(shape, vocab_size=_VOCABULARY, positions=_LENGTH, eos_id=0, seed=3)
    if epsilon is not None:
        for part in model.modules():
            if hasattr(part, "variance_epsilon"):
                part.variance_epsilon = epsilon
    layers = CompiledLayers(layers_of(model), torch.device("cpu")) if compiled else None
    updates = Updates(learning_rate=3e-3, weight_decay=0.1, warmup_steps=1, steps=9, clip_norm=0.5)
    kernel, _ = choose_kernel(torch.device("cpu"), torch.float32)
    student = Student(model, _VOCABULARY)
    engine = Single(student, MasterOptimiser(model, updates))
    return Trainer(student, engine, Objective(2.0, 0.3, 0.7, kernel), compiled=layers)


def _tokens(step: int) -> Tensor:
    return torch.randint(1, _VOCABULARY, (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(step))


def _targets(tokens: Tensor) -> Targets:
    rows = tokens[:, :-1].reshape(-1, 1)
    ids = (rows + torch.arange(4) * 7) % _VOCABULARY
    logprobs = torch.log_softmax(torch.cos(ids + rows).float(), -1) - 0.25
    return TopKTargets(ids.to(torch.int32), logprobs, torch.log1p(-logprobs.exp().sum(-1)))


@contextmanager
def _switched_off() -> Iterator[None]:
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before
