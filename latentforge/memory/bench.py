"""Closed-form memory of a run that measures how students write: their weights, in fp32, and nothing to train them."""

from __future__ import annotations

from latentforge.memory.codec import codec_parameters
from latentforge.memory.known import KnownModel
from latentforge.memory.latent import latent_parameters
from latentforge.memory.plan import MemoryPlan, Term, runtime
from latentforge.spec.bench import BenchSpec
from latentforge.spec.sections import PipelineSpec

_QUALITY_ROWS = 4
"""Rows of text whose logits are held at a time where a student's quality is measured."""


def quality_logits(spec: BenchSpec, *, length: int, vocab_size: int) -> int:
    """Bytes of the logits, in fp32 beside their logarithms, by which a student's quality is told; 0 where it is not."""
    return 2 * 4 * _QUALITY_ROWS * length * vocab_size if spec.quality_rows else 0


def bench_memory(
    *, latent: int | None, token: KnownModel | None, transformers: bool, logits: int, device: str
) -> MemoryPlan:
    """The plan of a bench of a latent student of so many bytes, its codec with it (None: there is none), and of a
    token-level one, which is there twice where transformers writes with it too. ``logits`` as of
    :func:`quality_logits`.

    Caches and activations are of a token at a time, and are left to the margin.
    """
    terms, unknown = list[Term](), list[str]()
    if latent is not None:
        terms.append(Term("student", latent))
    if token is not None:
        name = "student" if latent is None else "beside"
        each = (token.bytes or 0) * 4 // token.width if token.shape is None else 4 * token.shape.parameters
        terms.append(Term(name, each * (2 if transformers else 1)))
        unknown += [] if each else [name]
    if logits:
        terms.append(Term("logits", logits))
    return MemoryPlan("bench", (*terms, runtime(device)), tuple(unknown))


def pipeline_bench_memory(spec: PipelineSpec, token: KnownModel | None, *, vocab_size: int, device: str) -> MemoryPlan:
    """The plan of a pipeline's bench run; ``token`` is its token-level student, where it trains one."""
    latent = None
    if spec.through == "latent":
        known = {"chunk": spec.data.chunk, "vocab_size": vocab_size}
        latent = 4 * latent_parameters(spec.latent, latent=spec.autoencoder.latent, **known)
        latent += 4 * codec_parameters(spec.autoencoder, **known)
    logits = quality_logits(spec.bench, length=spec.data.sequence_length, vocab_size=vocab_size)
    place = "cpu" if spec.bench.device == "cpu" else device
    return bench_memory(latent=latent, token=token, transformers=spec.bench.transformers, logits=logits, device=place)
