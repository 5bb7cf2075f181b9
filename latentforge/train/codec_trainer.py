"""One optimiser step of a codec, over all chunks of a batch of rows, whatever the number of micro-batches."""

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
from latentforge.students.latent.chunks import chunked, valid
from latentforge.students.latent.codec import Codec
from latentforge.students.latent.codec_loss import (
    CodecLoss,
    CodecNoise,
    CodecTraining,
    Counted,
    noise_of,
)
from latentforge.students.latent.codec_report import Chunks
from latentforge.train.engines.protocol import Engine, Optimiser
from latentforge.train.loop import StepResult, bytes_of, refuse_not_finite
from latentforge.train.setting import evaluation_batches


@dataclass(frozen=True)
class CodecStep:
    """What one step did: ``result`` in nats a token over its tokens, and what a codec has beside them.

    ``kl`` nats a chunk, clipped; ``chunks`` that hold a token; ``padding`` places that hold none.
    """

    result: StepResult
    kl: float
    chunks: int
    padding: int

    def fields(self) -> dict[str, float | int]:
        """What a step's event says of it beside ``result``."""
        return {"kl": self.kl, "chunks": self.chunks, "padding": self.padding}


class CodecTrainer:
    """A codec with its objective, the engine that trains it, and the seed of its noise. ``plain`` is the codec itself,
    or a copy from before an engine wrapped it: what is whole of it is put in there, to be measured and saved."""

    def __init__(
        self,
        student: CodecTraining,
        engine: Engine,
        plain: Codec,
        *,
        eos_id: int,
        seed: int,
        micro_batch_size: int | None = None,
    ) -> None:
        self.student, self.engine, self._plain = student, engine, plain
        self.shape, self.objective = plain.shape, student.objective
        self.eos_id, self.seed, self.micro_batch_size = eos_id, seed, micro_batch_size
        self.watch = CompileWatch()

    @property
    def optimiser(self) -> Optimiser:
        """What updates the weights, and holds them whole for checkpoints."""
        return self.engine.optimiser

    @torch.no_grad()
    def whole(self) -> Codec:
        """The codec with its weights of now, as one process has it. Collective."""
        if self._plain is not self.student.codec:
            parameters = dict(self._plain.named_parameters())
            for name, weight in self.optimiser.each_weight():
                parameters[name].copy_(weight)
        return self._plain

    def chunks_of(self, tokens: Tensor) -> Chunks:
        """Rows int64 [B, L] as chunks [B · L/K, K], and which of their places hold a token."""
        ids = chunked(tokens, self.shape.chunk).flatten(0, 1)
        return ids, valid(ids, self.eos_id)

    def step(self, step: int, tokens: Tensor) -> CodecStep:
        """Train once on all of ``tokens`` int64 [B, L], of which each process of a run trains its share; ``step``
        counts from 0.

        FailedError, with nothing updated, where a row was not trained or a number is not finite.
        """
        began = time.perf_counter()
        learning_rate = self.optimiser.set_learning_rate(step)
        loss, ce, kl, rows, chunks, sequences = 0.0, 0.0, 0.0, 0, 0, 0
        sizes: list[int] = []
        counted = Counted.of(self.chunks_of(tokens)[1])
        for size, found in self._passes(step, tokens):
            sizes.append(size)
            loss, ce, kl = loss + float(found.loss.detach()), ce + float(found.ce), kl + float(found.kl)
            rows, chunks = rows + found.rows, chunks + found.chunks
        loss, ce, kl, *counts = self.engine.world.sums(loss, ce, kl, rows, chunks, sum(sizes))
        rows, chunks, sequences = (int(count) for count in counts)
        if (rows, chunks, sequences) != (*counted, len(tokens)):
            raise FailedError(
                f"step {step + 1}: {rows} of {counted.tokens} tokens in {chunks} of {counted.chunks} chunks were "
                "trained; the step is refused"
            )
        refuse_not_finite("loss", loss, step)
        grad_norm = self.engine.step()
        refuse_not_finite("gradient norm", grad_norm, step)
        result = StepResult(
            loss=loss,
            ce=ce,
            kd=None,
            learning_rate=learning_rate,
            rows=rows,
            sequences=sequences,
            micro_batches=tuple(sizes),
            denominator=counted.tokens,
            grad_norm=grad_norm,
            batch_sha256=hashlib.sha256(bytes_of(tokens)).hexdigest(),
            seconds=time.perf_counter() - began,
            compiles=tuple(self.watch.drain()),
            ce_rows=rows,
        )
        return CodecStep(result, kl, chunks, tokens.numel() - rows)

    def rehearse(self, tokens: Tensor) -> None:
        """One step's passes over ``tokens`` that change nothing: what a GPU loads at first use, it has then."""
        for _ in self._passes(0, tokens, scale=0.0):
            pass
        self.engine.rehearsed()

    def held_out(self, data: ShardSet) -> Iterator[Chunks]:
        """The chunks of all held-out rows, always the same ones in the same order."""
        device = self._plain.embedding.weight.device
        for tokens in evaluation_batches(data.heldout, device):
            yield self.chunks_of(tokens)

    def _passes(self, step: int, tokens: Tensor, *, scale: float = 1.0) -> Iterator[tuple[int, CodecLoss]]:
        """The passes of this process over its share of a step's rows, forward and backward: the rows of each, and what
        it found. Where others make more, empty ones follow, which are not told."""
        engine, world = self.engine, self.engine.world
        self.student.train()
        ids, places = self.chunks_of(tokens)
        each = len(ids) // len(tokens)
        noise = CodecNoise.drawn(ids, self.shape.latent, self.objective, noise_of(self.seed, step))
        counted = Counted.of(places)
        own = world.share(len(tokens))
        size = self.micro_batch_size or len(tokens)
        parts = (range(at, min(at + size, own.stop)) for at in range(own.start, own.stop, size))
        passes = world.passes(len(tokens), self.micro_batch_size)
        for number, rows in enumerate(world.padded(parts, passes)):
            # With no row left, one that is another's, and counts nothing.
            there = range(1) if rows is None else rows
            part = slice(there.start * each, there.stop * each)
            with engine.passing(last=number + 1 == passes):
                found: CodecLoss = engine.module(ids[part], places[part], noise.of(part), counted)
                engine.backward(found.loss * (0.0 if rows is None else scale))
            if rows is not None:
                yield len(rows), found
