"""One optimiser step over a whole batch, whatever the number of micro-batches, and held-out evaluation."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentforge.errors import FailedError
from latentforge.events import EventLog
from latentforge.kernels.api import kd_loss
from latentforge.kernels.guard.compiles import Compiles, CompileWatch
from latentforge.kernels.targets import Targets
from latentforge.students.causal import IGNORE, Student
from latentforge.train.effective import memory_in_use
from latentforge.train.optimiser import MasterOptimiser

TargetsOf = Callable[[Tensor], Targets]
"""The teacher's targets for tokens int64 [B, L]: N = B·(L-1) rows."""


@dataclass(frozen=True)
class Objective:
    """The weights of the loss, and which kernel computes it."""

    temperature: float
    ce_weight: float
    kd_weight: float
    kernel_backend: str


@dataclass(frozen=True)
class StepResult:
    """What one step did: losses in nats a token over all ``rows`` predictions of ``sequences`` sequences.

    ``micro_batches`` holds the sequences of each forward pass; ``kd`` is None where no targets were used;
    ``batch_sha256`` is that of the batch's tokens in their order; ``compiles`` what was compiled since the step before.
    """

    loss: float
    ce: float
    kd: float | None
    learning_rate: float
    rows: int
    sequences: int
    micro_batches: tuple[int, ...]
    denominator: int
    grad_norm: float
    batch_sha256: str
    seconds: float
    compiles: tuple[Compiles, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """Predictions trained a second."""
        return self.rows / self.seconds if self.seconds > 0 else 0.0


class Trainer:
    """A student, its optimiser and its objective."""

    def __init__(
        self,
        student: Student,
        optimiser: MasterOptimiser,
        objective: Objective,
        *,
        micro_batch_size: int | None = None,
    ) -> None:
        self.student = student
        self.optimiser = optimiser
        self.objective = objective
        self.micro_batch_size = micro_batch_size
        self.watch = CompileWatch()

    def step(self, step: int, tokens: Tensor, targets_of: TargetsOf | None) -> StepResult:
        """Train once on all of ``tokens`` int64 [B, L]; ``step`` counts from 0.

        The denominator counts the valid predictions of the whole batch before its first micro-batch. FailedError, with
        nothing updated, where a row was not trained or a number is not finite.
        """
        began = time.perf_counter()
        wanted = self.objective
        denominator = int((tokens[:, 1:] != IGNORE).sum())
        learning_rate = self.optimiser.set_learning_rate(step)
        self.student.train()
        rows, loss, ce, kd = 0, 0.0, 0.0, 0.0
        sizes: list[int] = []
        for part in tokens.split(self.micro_batch_size or len(tokens)):
            parts = self.student(
                part,
                targets_of(part) if targets_of is not None and wanted.kd_weight > 0 else None,
                denominator,
                temperature=wanted.temperature,
                ce_weight=wanted.ce_weight,
                kd_weight=wanted.kd_weight,
                kernel_backend=wanted.kernel_backend,
            )
            if parts.loss.requires_grad:
                parts.loss.backward()
                self.optimiser.collect()
            sizes.append(len(part))
            rows += parts.rows
            loss, ce, kd = loss + float(parts.loss.detach()), ce + float(parts.ce), kd + float(parts.kd)
        if rows != denominator or sum(sizes) != len(tokens):
            raise FailedError(f"step {step + 1}: {rows} of {denominator} rows were trained; the step is refused")
        _refuse_not_finite("loss", loss, step)
        grad_norm = self.optimiser.step()
        _refuse_not_finite("gradient norm", grad_norm, step)
        return StepResult(
            loss=loss,
            ce=ce,
            kd=kd if wanted.kd_weight > 0 else None,
            learning_rate=learning_rate,
            rows=rows,
            sequences=sum(sizes),
            micro_batches=tuple(sizes),
            denominator=denominator,
            grad_norm=grad_norm,
            batch_sha256=hashlib.sha256(_bytes(tokens)).hexdigest(),
            seconds=time.perf_counter() - began,
            compiles=tuple(self.watch.drain()),
        )


def log_step(log: EventLog, result: StepResult, *, step: int, steps: int, model: str) -> None:
    """Say what one step did, with every value that was in force; ``step`` counts from 1."""
    log_compiles(log, result.compiles, step=step, model=model)
    log.step(
        step,
        steps,
        model=model,
        loss=result.loss,
        kd=result.kd,
        ce=result.ce,
        learning_rate=result.learning_rate,
        rows=result.rows,
        tokens_per_second=result.tokens_per_second,
        grad_norm=result.grad_norm,
        memory_bytes=memory_in_use(),
        denominator=result.denominator,
        sequences=result.sequences,
        micro_batches=len(result.micro_batches),
        batch_sha256=result.batch_sha256,
        compiles=sum(found.count for found in result.compiles),
    )


def log_compiles(log: EventLog, compiles: Sequence[Compiles], *, step: int, model: str) -> None:
    """An event for each compiler that was at work after set-up: a run must have none."""
    for found in compiles:
        log.compile(found.compiler, count=found.count, what=found.what, step=step, model=model)


@dataclass(frozen=True)
class Evaluation:
    """Held-out means in nats a token: ``loss`` = cross-entropy, ``kl`` = KL(teacher || student) or None.

    ``rows`` predictions went into them; ``rows_sha256`` is that of their tokens in their order.
    """

    loss: float
    kl: float | None
    rows: int
    rows_sha256: str


def rehearse(trainer: Trainer, tokens: Tensor, targets_of: TargetsOf | None) -> None:
    """One step's passes over ``tokens`` that change nothing: what a GPU loads or compiles at first use, it has then.

    Losses and gradients are thrown away; weights, moments, schedule and generators stay as they are.
    """
    student, wanted = trainer.student, trainer.objective
    student.train()
    parts = {len(part): part for part in tokens.split(trainer.micro_batch_size or len(tokens))}
    with torch.random.fork_rng():
        for part in parts.values():
            found = student(
                part,
                targets_of(part) if targets_of is not None and wanted.kd_weight > 0 else None,
                int((tokens[:, 1:] != IGNORE).sum()),
                temperature=wanted.temperature,
                ce_weight=wanted.ce_weight,
                kd_weight=wanted.kd_weight,
                kernel_backend=wanted.kernel_backend,
            )
            if found.loss.requires_grad:
                found.loss.backward()
    student.zero_grad(set_to_none=True)
    trainer.watch.drain()


@torch.no_grad()
def evaluate(
    student: Student, batches: Iterable[Tensor], targets_of: TargetsOf | None, *, temperature: float, backend: str
) -> Evaluation:
    """Cross-entropy and KL to the teacher (at ``temperature``) over batches of tokens int64 [B, L]."""
    student.eval()
    loss, kl, rows = 0.0, 0.0, 0
    seen = hashlib.sha256()
    for tokens in batches:
        seen.update(_bytes(tokens))
        labels = tokens[:, 1:].reshape(-1)
        parts = kd_loss(
            student.logits(tokens),
            None if targets_of is None else targets_of(tokens),
            labels,
            temperature=temperature,
            ce_weight=1.0,
            kd_weight=0.0 if targets_of is None else 1.0,
            denominator=1.0,
            ignore_index=IGNORE,
            backend=backend,
        )
        loss += float(parts.ce)
        kl += float(parts.kd)
        rows += int((labels != IGNORE).sum())
    if rows == 0:
        raise FailedError("the held-out split has no row to evaluate on")
    # kd carries T squared, which belongs to the gradient's scale, not to a divergence.
    mean_kl = None if targets_of is None else kl / rows / temperature**2
    return Evaluation(loss / rows, mean_kl, rows, seen.hexdigest())


def _bytes(tokens: Tensor) -> bytes:
    return bytes(tokens.cpu().numpy().tobytes())


def _refuse_not_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise FailedError(
            f"{what} is {value} at step {step + 1}; nothing was updated",
            next="lower the learning rate, give more warm-up steps, or look at the data and targets of this step",
        )
