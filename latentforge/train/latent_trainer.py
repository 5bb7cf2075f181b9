"""One optimiser step of a latent student, whatever the number of micro-batches, and its held-out losses."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from latentforge.data.shards import ShardSet
from latentforge.errors import FailedError
from latentforge.kernels.guard.compiles import CompileWatch
from latentforge.students.latent.student import LatentLoss, LatentStudent
from latentforge.train.engines.protocol import Engine, Optimiser
from latentforge.train.latent_lessons import TEMPERED, Counts, Drawn, Lesson, Teaching, row_seeds
from latentforge.train.loop import StepResult, bytes_of, refuse_not_finite
from latentforge.train.setting import evaluation_batches

HELD_OUT = -1
"""The step whose noise is that of the held-out text."""


@dataclass(frozen=True)
class LatentStep:
    """What one step did: ``result`` over its tokens, the mean loss of each signal by name, and what went into it."""

    result: StepResult
    parts: dict[str, float]
    counts: Counts

    def fields(self) -> dict[str, float | int]:
        """What a step's event says of it beside ``result``."""
        # A step's own ``ce`` and ``kd`` are the token head's.
        named = {"ce": "decoded_ce", "kl": "decoded_kl"}
        said = {
            named.get(name, name): value for name, value in self.parts.items() if name not in ("token_ce", "token_kd")
        }
        chunks = {f"{name}_chunks": count for name, count in self.counts.energy.items()}
        return {**said, **chunks, "padding": self.counts.padding}


@dataclass(frozen=True)
class HeldOut:
    """Held-out means by signal: an energy score a chunk, nats a token, a squared error a number of the latent.

    ``loss`` is their sum as it is weighted in training; ``rows_sha256`` that of the rows' tokens in their order.
    """

    loss: float
    parts: dict[str, float]
    tokens: int
    rows_sha256: str


class LatentTrainer:
    """A latent student, the engine that trains it, its signals and the seed of its noise."""

    def __init__(
        self,
        student: LatentStudent,
        engine: Engine,
        teaching: Teaching,
        *,
        seed: int,
        micro_batch_size: int | None,
    ) -> None:
        self.student, self.engine, self.teaching = student, engine, teaching
        self.seed, self.micro_batch_size = seed, micro_batch_size
        self.watch = CompileWatch()

    @property
    def optimiser(self) -> Optimiser:
        """What updates the weights, and holds them whole for checkpoints."""
        return self.engine.optimiser

    def step(
        self, step: int, tokens: Tensor, *, visits: Tensor | None = None, covered: Tensor | None = None
    ) -> LatentStep:
        """Train once on all of ``tokens`` int64 [B, L], of which each process of a run trains its share; ``step``
        counts from 0, ``visits`` and ``covered`` are as of ``Teaching.drawn``.

        Denominators count the whole batch before its first micro-batch. FailedError, with nothing updated, where a
        chunk or a token of it was not trained, or a number is not finite.
        """
        began = time.perf_counter()
        learning_rate = self.optimiser.set_learning_rate(step)
        self.student.train()
        drawn = self.teaching.drawn(tokens, visits=visits, covered=covered)
        counts = self.teaching.counts(tokens, drawn)
        seeds = row_seeds(self.seed, step, len(tokens))
        sizes: list[int] = []
        loss, parts, energy, told = 0.0, dict[str, float](), dict.fromkeys(counts.energy, 0), 0
        engine, world = self.engine, self.engine.world
        for lesson, found in self._passes(tokens, seeds, drawn, counts):
            sizes.append(len(lesson.chunks))
            loss += float(found.loss.detach())
            told += found.tokens
            for name, value in self._parts_of(found).items():
                parts[name] = parts.get(name, 0.0) + value
            for name, rows in found.rows.items():
                energy[name] += rows
        wanted = counts.tokens if self.teaching.has_tokens else 0
        names = sorted(self.teaching.parts)
        loss, sequences, told, *each = world.sums(
            loss,
            sum(sizes),
            told,
            *(parts.get(name, 0.0) for name in names),
            *(energy[name] for name in counts.energy),
        )
        sequences, told = int(sequences), int(told)
        parts = {name: value for name, value in zip(names, each, strict=False) if name in parts}
        energy = {name: int(value) for name, value in zip(counts.energy, each[len(names) :], strict=True)}
        if sequences != len(tokens) or energy != counts.energy or told != wanted:
            raise FailedError(
                f"step {step + 1}: {sequences} of {len(tokens)} rows, {told} of {wanted} tokens, {energy} of "
                f"{counts.energy} chunks were trained; the step is refused"
            )
        refuse_not_finite("loss", loss, step)
        grad_norm = engine.step()
        refuse_not_finite("gradient norm", grad_norm, step)
        result = StepResult(
            loss=loss,
            ce=parts.get("token_ce"),
            kd=parts.get("token_kd"),
            learning_rate=learning_rate,
            rows=counts.tokens,
            sequences=sequences,
            micro_batches=tuple(sizes),
            denominator=counts.tokens,
            grad_norm=grad_norm,
            batch_sha256=hashlib.sha256(bytes_of(tokens)).hexdigest(),
            seconds=time.perf_counter() - began,
            compiles=tuple(self.watch.drain()),
        )
        return LatentStep(result, parts, counts)

    @torch.no_grad()
    def held_out(self, data: ShardSet) -> HeldOut:
        """Each signal over all held-out rows, always the same ones, with the same noise and the same continuations."""
        self.student.eval()
        seeds = row_seeds(self.seed, HELD_OUT, len(data.heldout))
        size = self.engine.world.rows(self.teaching.spec.batch_size, self.micro_batch_size)
        seen, sums, rows, tokens_seen, at = hashlib.sha256(), dict[str, float](), dict[str, int](), 0, 0
        for block in evaluation_batches(data.heldout, self.student.table.weight.device):
            seen.update(bytes_of(block))
            for tokens in block.split(size):
                drawn = self.teaching.drawn(tokens)
                counts = self.teaching.counts(tokens, drawn)
                found = self._pass(self.teaching.lesson(tokens, seeds[at : at + len(tokens)], drawn, counts))
                at, tokens_seen = at + len(tokens), tokens_seen + counts.tokens
                for name, value in self._parts_of(found).items():
                    count = counts.of(name)
                    sums[name] = sums.get(name, 0.0) + value * count
                    rows[name] = rows.get(name, 0) + count
        means = {name: value / rows[name] for name, value in sums.items()}
        loss = sum(self.teaching.weight_of(name) * value for name, value in means.items())
        return HeldOut(loss, self._in_their_units(means), tokens_seen, seen.hexdigest())

    def rehearse(self, data: ShardSet, tokens: Tensor, covered: Tensor | None) -> None:
        """A step's and the held-out text's passes that change nothing: what a GPU loads at first use, it has then."""
        self.student.train()
        drawn = self.teaching.drawn(tokens, covered=covered)
        counts = self.teaching.counts(tokens, drawn)
        seeds = row_seeds(self.seed, 0, len(tokens))
        for _ in self._passes(tokens, seeds, drawn, counts, scale=0.0):
            pass
        self.engine.rehearsed()
        self.held_out(data)
        self.watch.drain()

    def _passes(
        self, tokens: Tensor, seeds: Tensor, drawn: dict[str, Drawn], counts: Counts, *, scale: float = 1.0
    ) -> Iterator[tuple[Lesson, LatentLoss]]:
        """Forward and backward over this process's share of a batch: each lesson and what it came to. Where others make
        more passes, empty ones follow, which are not told. ``scale`` 0 leaves gradients of zero."""
        engine, world = self.engine, self.engine.world
        passes = world.passes(len(tokens), self.micro_batch_size)
        shared = {"together": world.size > 1}
        batch = (tokens, seeds, drawn, counts, self.micro_batch_size or len(tokens))
        lessons = self.teaching.lessons(*batch, rows=world.share(len(tokens)), **shared)
        for number, lesson in enumerate(world.padded(lessons, passes)):
            with engine.passing(last=number + 1 == passes):
                if lesson is None:  # no row is left here, and others wait in every layer
                    (again,) = self.teaching.lessons(*batch, rows=slice(0, 1), **shared)
                    engine.backward(self._pass(again).loss * 0.0)
                    continue
                found = self._pass(lesson)
                engine.backward(found.loss * scale)
            yield lesson, found

    def _pass(self, lesson: Lesson) -> LatentLoss:
        if not lesson.teaches:
            unasked = torch.full((), torch.nan)
            return LatentLoss(torch.zeros(()), {}, unasked, unasked, {}, 0)
        found: LatentLoss = self.engine.module(
            lesson.chunks,
            lesson.valid,
            lesson.seeds,
            energy=lesson.energy,
            tokens=lesson.tokens,
            vector=lesson.vector,
            kernel_backend=self.teaching.kernel,
        )
        return found

    def _parts_of(self, found: LatentLoss) -> dict[str, float]:
        """The unweighted loss of each signal that is switched on."""
        parts = {name: float(value) for name, value in found.energy.items()}
        parts |= {"token_ce": float(found.token_ce), "token_kd": float(found.token_kd)}
        if found.vector is not None:
            parts |= {"mse": float(found.vector.mse), "ce": float(found.vector.ce), "kl": float(found.vector.kl)}
        return {name: value for name, value in parts.items() if name in self.teaching.parts}

    def _in_their_units(self, means: dict[str, float]) -> dict[str, float]:
        """Divergences without T squared, which belongs to the gradient's scale; the tempered ones as one, and each."""
        square = self.teaching.spec.token_temperature**2
        found = {name: value / square if name in ("token_kd", "kl") else value for name, value in means.items()}
        tempered = [value for name, value in found.items() if name.startswith(f"{TEMPERED}_")]
        return found | ({TEMPERED: sum(tempered) / len(tempered)} if tempered else {})
