"""Closed-form memory of a run that trains a codec: weights, states, activations, the last layer's chunk of logits."""

from __future__ import annotations

from latentforge.memory.plan import MemoryPlan, Term, checkpoint_term, runtime
from latentforge.memory.spread import Held, Numbers, Spread, whole_terms
from latentforge.spec.latent import AutoencoderSpec

LOGIT_ROWS = 4096
"""More rows of logits than ``linear_kd_loss`` holds at a time where it chooses itself."""


def codec_parameters(spec: AutoencoderSpec, *, chunk: int, vocab_size: int) -> int:
    """The parameters of a codec: four blocks, an embedding with a row for the mask, and what joins and splits."""
    width, latent, block = spec.width, spec.latent, codec_block(spec)
    encoder = (chunk * width + 1) * width + width + (width + 1) * 2 * latent
    decoder = (latent + 1) * width + (width + 1) * chunk * width + width
    return (vocab_size + 1) * width + 4 * block + encoder + decoder


def codec_block(spec: AutoencoderSpec) -> int:
    """The parameters of one of its four blocks."""
    return spec.width + 3 * spec.width * spec.inner


def codec_activation_bytes(spec: AutoencoderSpec, *, chunk: int, chunks: int) -> int:
    """Bytes kept between forward and backward for ``chunks`` chunks in flight, rounded up; logits not counted."""
    width, inner, latent = spec.width, spec.inner, spec.latent
    block = 2 * width + 4 * inner + 1
    floats = 2 * (chunk + 1) * block + 7 * chunk * width + 6 * width + 12 * latent + 8 * chunk
    return 4 * floats * chunks


def autoencoder_memory(
    spec: AutoencoderSpec,
    *,
    chunk: int,
    length: int,
    vocab_size: int,
    device: str,
    hosts: int = 1,
    leads: bool = True,
) -> MemoryPlan:
    """The plan of a run that trains a codec of ``chunk`` tokens on rows of ``length`` tokens, on one of ``hosts``, of
    which the first ``leads``."""
    count = codec_parameters(spec, chunk=chunk, vocab_size=vocab_size)
    spread, block = Spread.of(spec.distributed, spec.processes, hosts), codec_block(spec)
    tokens = spread.rows(spec.batch_size, spec.micro_batch_size) * length
    # Half as much again for the gradients that flow back while they are in use.
    activations = codec_activation_bytes(spec, chunk=chunk, chunks=tokens // chunk) * 3 // 2
    logits = 2 * 4 * min(tokens, LOGIT_ROWS) * vocab_size
    held = Held.of(spread, Numbers(count, block, count - 4 * block), "fp32", accumulates=True, device=device)
    return MemoryPlan(
        "autoencoder",
        (
            *held.standing("codec"),
            *whole_terms(spread, 4 * count),
            checkpoint_term(count, room=activations + logits if spec.checkpoint_every >= spec.steps else 0),
            Term("activations", activations),
            Term("logits", logits),
            runtime(device),
        ),
    ).on(spec.processes, first=leads)
