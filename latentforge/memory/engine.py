"""A teacher that a vLLM of our own serves, on the same host as everything else: what its process tree holds.

The figures of the constants: ``reference`` GB10 notes, sections 5 and (c).
"""

from __future__ import annotations

from dataclasses import dataclass

from latentforge.memory.known import KnownModel
from latentforge.memory.plan import GIB, Term
from latentforge.spec.sections import TeacherSpec

_CHUNK = 2048
"""Tokens that the engine computes at once: its log-probabilities are made for so many rows."""
_COPIES = 3
"""fp32 rows of the vocabulary at once: logits, log-probabilities, and what the selection of the largest works with."""
_LEAST_KV = 256 << 20
"""An engine hands its cache out in blocks, and of a tiny model's it would get less than one."""
_RUNTIME = {"cuda": 4 * GIB, "cpu": 1 * GIB}
"""Context, workspaces and graphs on a GPU; on a CPU what its engine allocates beside weights and caches."""
_HOST = {"cuda": 6 * GIB, "cpu": 2 * GIB}
"""The engine's own processes: tokenizer, scheduler, API, each with torch."""


@dataclass(frozen=True)
class EngineSetting:
    """How the engine is run: ``kv_tokens`` is the length of its pinned cache over all sequences together, ``width`` the
    bytes of a number that it computes with (in weights that are not quantised, and in the cache)."""

    sequences: int
    kv_tokens: int
    method: str | None = None
    width: int = 2

    @classmethod
    def of(cls, spec: TeacherSpec, model: KnownModel) -> EngineSetting:
        """The engine of a spec: a cache for two of the longest sequences that it admits.

        One is the least with which it starts. Scoring is prefill, so what waits for a place in it loses little.
        """
        longest = min(spec.max_model_len, model.positions or spec.max_model_len)
        width = {"fp32": 4, "bf16": 2}.get(spec.precision, model.width)
        return cls(spec.concurrency, 2 * longest, spec.quantization, width)


def pinned_kv_bytes(model: KnownModel, setting: EngineSetting) -> int | None:
    """Bytes to give to the engine's ``--kv-cache-memory-bytes``; None where the model's caches are not known.

    A share of the pool (``gpu_memory_utilization``) is no bound on one pool for both; bytes are.
    """
    if model.cache is None:
        return None
    return max(_LEAST_KV, model.cache.kv_bytes(setting.kv_tokens, setting.width))


def engine_terms(model: KnownModel, setting: EngineSetting, device: str) -> tuple[list[Term], list[str]]:
    """The terms of the engine's process tree, and the names of what could not be counted."""
    device = "cuda" if device == "cuda" else "cpu"
    weights, kv = model.engine_weights(setting.method, setting.width), pinned_kv_bytes(model, setting)
    unknown = [] if weights is not None else ["the teacher's weights"]
    unknown += [] if kv is not None else ["the teacher's keys and values"]
    terms = [
        Term("teacher", weights if weights is not None else model.bytes or 0, True),
        Term("kv", kv or 0, True),
        Term("sequences", model.cache.state_bytes(setting.sequences) if model.cache is not None else 0, True),
    ]
    if model.vocabulary is not None:
        terms.append(Term("logprobs", _COPIES * 4 * min(_CHUNK, setting.kv_tokens) * model.vocabulary, True))
    else:
        unknown.append("the teacher's log-probabilities")
    return [*terms, Term("engine", _RUNTIME[device], True), Term("engine host", _HOST[device], True)], unknown
