"""Closed-form memory of a run that trains a codec: weights, states, activations, the last layer's chunk of logits."""

from __future__ import annotations

from latentforge.memory.plan import MemoryPlan, Term, checkpoint_term, runtime
from latentforge.spec.latent import AutoencoderSpec

LOGIT_ROWS = 4096
"""More rows of logits than ``linear_kd_loss`` holds at a time where it chooses itself."""


def codec_parameters(spec: AutoencoderSpec, *, chunk: int, vocab_size: int) -> int:
    """The parameters of a codec: four blocks, an embedding with a row for the mask, and what joins and splits."""
    width, inner, latent = spec.width, spec.inner, spec.latent
    block = width + 3 * width * inner
    encoder = (chunk * width + 1) * width + width + (width + 1) * 2 * latent
    decoder = (latent + 1) * width + (width + 1) * chunk * width + width
    return (vocab_size + 1) * width + 4 * block + encoder + decoder


def codec_activation_bytes(spec: AutoencoderSpec, *, chunk: int, chunks: int) -> int:
    """Bytes kept between forward and backward for ``chunks`` chunks in flight, rounded up; logits not counted."""
    width, inner, latent = spec.width, spec.inner, spec.latent
    block = 2 * width + 4 * inner + 1
    floats = 2 * (chunk + 1) * block + 7 * chunk * width + 6 * width + 12 * latent + 8 * chunk
    return 4 * floats * chunks


def autoencoder_memory(spec: AutoencoderSpec, *, chunk: int, length: int, vocab_size: int, device: str) -> MemoryPlan:
    """The plan of a run that trains a codec of ``chunk`` tokens on rows of ``length`` tokens."""
    count = codec_parameters(spec, chunk=chunk, vocab_size=vocab_size)
    tokens = (spec.micro_batch_size or spec.batch_size) * length
    activations = codec_activation_bytes(spec, chunk=chunk, chunks=tokens // chunk)
    return MemoryPlan(
        "autoencoder",
        (
            Term("codec", 4 * count),
            Term("states", 12 * count),
            checkpoint_term(count),
            # Half as much again for the gradients that flow back while they are in use.
            Term("activations", activations * 3 // 2),
            Term("logits", 2 * 4 * min(tokens, LOGIT_ROWS) * vocab_size),
            runtime(device),
        ),
    ).on(spec.processes)
