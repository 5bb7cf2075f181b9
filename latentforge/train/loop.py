"""One optimiser step over a whole batch, whatever the number of micro-batches, and held-out evaluation."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentforge.errors import FailedError
from latentforge.events import EventLog
from latentforge.kernels.guard.compiles import Compiles, CompileWatch
from latentforge.kernels.targets import Targets
from latentforge.students.causal import IGNORE, LossParts, RowUse, Student
from latentforge.train import held
from latentforge.train.compiled import CompiledLayers
from latentforge.train.engines.protocol import Engine, Optimiser


@dataclass(frozen=True)
class Lesson:
    """A part of a batch as it is trained: tokens int64 [b, L], the targets of its taught rows, and what each row is
    for (None: every row is labelled, and taught where there are targets).
    """

    tokens: Tensor
    targets: Targets | None
    use: RowUse | None = None


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

    ``micro_batches`` holds the sequences of each forward pass of this process; ``ce`` is the mean over the ``ce_rows``
    that had a label, ``kd`` over the ``kd_rows`` that had targets and None where there were none (``kd_rows`` is None
    where none were wanted); ``batch_sha256`` is that of the batch's tokens in their order; ``compiles`` what was
    compiled since the step before; ``padding`` the predictions of the batch that are none, None where rows are not
    padded.
    """

    loss: float
    ce: float | None
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
    ce_rows: int = 0
    kd_rows: int | None = None
    padding: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """Predictions trained a second."""
        return self.rows / self.seconds if self.seconds > 0 else 0.0


class Trainer:
    """A student, the engine that trains it, and its objective."""

    def __init__(
        self,
        student: Student,
        engine: Engine,
        objective: Objective,
        *,
        micro_batch_size: int | None = None,
        compiled: CompiledLayers | None = None,
    ) -> None:
        self.student = student
        self.engine = engine
        self.objective = objective
        self.micro_batch_size = micro_batch_size
        self.compiled = compiled
        self.watch = CompileWatch()

    @property
    def optimiser(self) -> Optimiser:
        """What updates the weights, and holds them whole for checkpoints."""
        return self.engine.optimiser

    def step(self, step: int, tokens: Tensor, targets_of: TargetsOf | Iterable[Lesson] | None) -> StepResult:
        """Train once on all of ``tokens`` int64 [B, L], of which each process of a run trains its share; ``step``
        counts from 0.

        With lessons it is these that are trained, each a part of this process's share in some form. The denominator
        counts the valid predictions of the whole batch before its first micro-batch. FailedError, with nothing updated,
        where a row was not trained or a number is not finite.
        """
        began = time.perf_counter()
        wanted, engine, world = self.objective, self.engine, self.engine.world
        labels = self.student.labels(tokens)
        denominator = int((labels != IGNORE).sum())
        learning_rate = self.optimiser.set_learning_rate(step)
        self.student.train()
        rows, ce_rows, kd_rows, loss, ce, kd = 0, 0, 0, 0.0, 0.0, 0.0
        sizes: list[int] = []
        wants_targets = targets_of is not None and wanted.kd_weight > 0
        for lesson, parts in self.passes(tokens, targets_of if wants_targets else None, denominator):
            sizes.append(len(lesson.tokens))
            rows += parts.rows
            ce_rows += parts.rows if parts.ce_rows is None else parts.ce_rows
            taught = (0 if lesson.targets is None else parts.rows) if parts.kd_rows is None else parts.kd_rows
            kd_rows += taught
            loss, ce = loss + float(parts.loss.detach()), ce + float(parts.ce)
            kd += float(parts.kd) if taught else 0.0
        loss, ce, kd, *counts = world.sums(loss, ce, kd, rows, ce_rows, kd_rows, sum(sizes))
        rows, ce_rows, kd_rows, sequences = (int(count) for count in counts)
        if rows != denominator or sequences != len(tokens):
            raise FailedError(f"step {step + 1}: {rows} of {denominator} rows were trained; the step is refused")
        refuse_not_finite("loss", loss, step)
        grad_norm = engine.step()
        refuse_not_finite("gradient norm", grad_norm, step)
        return StepResult(
            loss=loss,
            # The parts are sums over the step's denominator; said are means over the rows that they are of.
            ce=ce * (denominator / ce_rows) if ce_rows else None,
            kd=kd * (denominator / kd_rows) if kd_rows else None,
            learning_rate=learning_rate,
            rows=rows,
            sequences=sequences,
            micro_batches=tuple(sizes),
            denominator=denominator,
            grad_norm=grad_norm,
            batch_sha256=hashlib.sha256(bytes_of(tokens)).hexdigest(),
            seconds=time.perf_counter() - began,
            compiles=tuple(self.watch.drain()),
            ce_rows=ce_rows,
            kd_rows=kd_rows if wants_targets else None,
            padding=None if self.student.padding is None else len(labels) - denominator,
        )

    def passes(
        self,
        tokens: Tensor,
        targets_of: TargetsOf | Iterable[Lesson] | None,
        denominator: int,
        *,
        scale: float = 1.0,
    ) -> Iterator[tuple[Lesson, LossParts]]:
        """Forward and backward over this process's share of ``tokens`` int64 [B, L]: each lesson and what it came to.

        Where other processes make more passes, empty ones follow, which are not told: they wait for this one in their
        collective calls. ``scale`` 0 leaves gradients of zero.
        """
        engine, world = self.engine, self.engine.world
        count = world.passes(len(tokens), self.micro_batch_size)
        lessons = lessons_of(tokens[world.share(len(tokens))], targets_of, self.micro_batch_size)
        for number, lesson in enumerate(world.padded(lessons, count)):
            with engine.passing(last=number + 1 == count):
                if lesson is None:
                    engine.backward(self.empty_pass(tokens, denominator))
                    continue
                parts = self.pass_over(lesson, denominator)
                engine.backward(parts.loss * scale)
            yield lesson, parts

    def pass_over(self, lesson: Lesson, denominator: int) -> LossParts:
        """The loss of one lesson under this trainer's objective."""
        wanted = self.objective
        # Without use the call is the one that it always was: a student of one's own need not know the word.
        of_rows: dict[str, Any] = {} if lesson.use is None else {"use": lesson.use}
        ran = 0 if self.compiled is None else self.compiled.runs
        found: LossParts = self.engine.module(
            lesson.tokens,
            lesson.targets,
            denominator,
            temperature=wanted.temperature,
            ce_weight=wanted.ce_weight,
            kd_weight=wanted.kd_weight,
            kernel_backend=wanted.kernel_backend,
            **of_rows,
        )
        if self.compiled is not None:
            self.compiled.require(ran)
        return found

    def empty_pass(self, tokens: Tensor, denominator: int) -> Tensor:
        """A loss of zero, with gradients of zero, of a process that has no row left while others go on: they wait for
        it in their collective calls. Nothing of it is counted."""
        found: LossParts = self.engine.module(
            tokens[:1],
            None,
            denominator,
            temperature=1.0,
            ce_weight=1.0,
            kd_weight=0.0,
            kernel_backend=self.objective.kernel_backend,
        )
        return found.loss * 0.0


def lessons_of(
    tokens: Tensor, targets_of: TargetsOf | Iterable[Lesson] | None, micro_batch_size: int | None
) -> Iterator[Lesson]:
    """The parts of a batch as they are trained: those that were made of it, or its micro-batches with their targets."""
    if targets_of is not None and not callable(targets_of):
        yield from targets_of
        return
    for part in tokens.split(micro_batch_size or len(tokens)) if len(tokens) else ():
        yield Lesson(part, None if targets_of is None else targets_of(part))


def log_step(log: EventLog, result: StepResult, *, step: int, steps: int, model: str, **fields: Any) -> None:
    """Say what one step did, with every value that was in force; ``step`` counts from 1, ``fields`` are more of it."""
    if result.kd_rows is not None:
        fields = {"kd_rows": result.kd_rows, **fields}
    if result.padding is not None:
        fields = {"padding": result.padding, **fields}
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
        memory_bytes=held.now(),
        denominator=result.denominator,
        sequences=result.sequences,
        micro_batches=len(result.micro_batches),
        batch_sha256=result.batch_sha256,
        compiles=sum(found.count for found in result.compiles),
        **fields,
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

    Losses are thrown away and gradients are zero; weights, moments, schedule and generators stay as they are. By all
    processes of a run.
    """
    trainer.student.train()
    denominator = int((trainer.student.labels(tokens) != IGNORE).sum())
    with torch.random.fork_rng():
        taught = targets_of if trainer.objective.kd_weight > 0 else None
        for _ in trainer.passes(tokens, taught, denominator, scale=0.0):
            pass
    trainer.engine.rehearsed()
    trainer.watch.drain()


@torch.no_grad()
def evaluate(
    student: nn.Module, batches: Iterable[Tensor], targets_of: TargetsOf | None, *, temperature: float, backend: str
) -> Evaluation:
    """Cross-entropy and KL to the teacher (at ``temperature``) over batches of tokens int64 [B, L].

    ``student`` is a :class:`Student`, or what an engine has made of it. The KL is a mean over the rows in which the
    teacher says something; None where there are none.
    """
    student.eval()
    loss, kl, rows, heard = 0.0, 0.0, 0, 0
    seen = hashlib.sha256()
    for tokens in batches:
        seen.update(bytes_of(tokens))
        targets = None if targets_of is None else targets_of(tokens)
        parts: LossParts = student(
            tokens,
            targets,
            1.0,
            temperature=temperature,
            ce_weight=1.0,
            kd_weight=0.0 if targets_of is None else 1.0,
            kernel_backend=backend,
        )
        loss += float(parts.ce)
        kl += float(parts.kd)
        rows += parts.rows
        heard += (0 if targets is None else parts.rows) if parts.kd_rows is None else parts.kd_rows
    if rows == 0:
        raise FailedError("the held-out split has no row to evaluate on")
    # kd carries T squared, which belongs to the gradient's scale, not to a divergence.
    mean_kl = kl / heard / temperature**2 if heard else None
    return Evaluation(loss / rows, mean_kl, rows, seen.hexdigest())


def bytes_of(tokens: Tensor) -> bytes:
    """The tokens' bytes, by which a batch is told from another."""
    return bytes(tokens.cpu().numpy().tobytes())


class NotFinite(FailedError):
    """A step whose loss or gradient is no number, and which has updated nothing."""


def refuse_not_finite(what: str, value: float, step: int) -> None:
    """NotFinite where a number of ``step`` (from 0) is not finite."""
    if not math.isfinite(value):
        raise NotFinite(
            f"{what} is {value} at step {step + 1}; nothing was updated",
            next="lower the learning rate, give more warm-up steps, or look at the data and targets of this step",
        )
