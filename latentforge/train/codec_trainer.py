"""One optimiser step of a codec, over all chunks of a batch of rows."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from latentforge.data.shards import ShardSet
from latentforge.kernels.guard.compiles import CompileWatch
from latentforge.students.latent.chunks import chunked, valid
from latentforge.students.latent.codec import Codec
from latentforge.students.latent.codec_loss import CodecObjective, codec_loss, noise_of
from latentforge.students.latent.codec_report import Chunks
from latentforge.train.loop import StepResult, bytes_of, refuse_not_finite
from latentforge.train.optimiser import MasterOptimiser
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
    """A codec, its optimiser, its objective and the seed of its noise."""

    def __init__(
        self, codec: Codec, optimiser: MasterOptimiser, objective: CodecObjective, *, eos_id: int, seed: int
    ) -> None:
        self.codec = codec
        self.optimiser = optimiser
        self.objective = objective
        self.eos_id = eos_id
        self.seed = seed
        self.watch = CompileWatch()

    def chunks_of(self, tokens: Tensor) -> Chunks:
        """Rows int64 [B, L] as chunks [B · L/K, K], and which of their places hold a token."""
        ids = chunked(tokens, self.codec.shape.chunk).flatten(0, 1)
        return ids, valid(ids, self.eos_id)

    def step(self, step: int, tokens: Tensor) -> CodecStep:
        """Train once on all of ``tokens`` int64 [B, L]; ``step`` counts from 0.

        FailedError, with nothing updated, where a number is not finite.
        """
        began = time.perf_counter()
        learning_rate = self.optimiser.set_learning_rate(step)
        self.codec.train()
        ids, places = self.chunks_of(tokens)
        parts = codec_loss(self.codec, ids, places, self.objective, noise_of(self.seed, step))
        refuse_not_finite("loss", float(parts.loss.detach()), step)
        parts.loss.backward()
        self.optimiser.collect()
        grad_norm = self.optimiser.step()
        refuse_not_finite("gradient norm", grad_norm, step)
        result = StepResult(
            loss=float(parts.loss.detach()),
            ce=float(parts.ce),
            kd=None,
            learning_rate=learning_rate,
            rows=parts.rows,
            sequences=len(tokens),
            micro_batches=(len(tokens),),
            denominator=int(places.sum()),
            grad_norm=grad_norm,
            batch_sha256=hashlib.sha256(bytes_of(tokens)).hexdigest(),
            seconds=time.perf_counter() - began,
            compiles=tuple(self.watch.drain()),
            ce_rows=parts.rows,
        )
        return CodecStep(result, float(parts.kl), parts.chunks, tokens.numel() - parts.rows)

    def rehearse(self, tokens: Tensor) -> None:
        """One step's passes over ``tokens`` that change nothing: what a GPU loads at first use, it has then."""
        self.codec.train()
        codec_loss(self.codec, *self.chunks_of(tokens), self.objective, noise_of(self.seed, 0)).loss.backward()
        self.codec.zero_grad(set_to_none=True)

    def held_out(self, data: ShardSet) -> Iterator[Chunks]:
        """The chunks of all held-out rows, always the same ones in the same order."""
        device = self.codec.embedding.weight.device
        for tokens in evaluation_batches(data.heldout, device):
            yield self.chunks_of(tokens)
