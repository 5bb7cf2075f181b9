"""What a run holds in which a teacher goes on with its texts: the shared row's cache, copied for each draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

from latentforge.memory.activations import activation_bytes, kv_bytes
from latentforge.memory.plan import MemoryPlan, Term, runtime
from latentforge.spec.latent import ContinuationsSpec

if TYPE_CHECKING:
    from latentforge.memory.estimate import Answering


def continuations_memory(teacher: Answering, spec: ContinuationsSpec, *, chunk: int, length: int) -> MemoryPlan:
    """The plan of a run whose teacher goes on after each chunk of rows of ``length`` tokens.

    In process each draw keeps the keys and values of the row and of what it drew itself, and a pass computes one token
    of every context of every draw; logits are of the one row whose draws are compared.
    """
    shape = teacher.model.shape
    terms, unknown = teacher.terms(1, length, copies=3)
    if teacher.place == "process" and shape is not None:
        contexts = max(1, length // chunk - 1)
        draws = spec.count * len(spec.temperatures)
        draws *= rows_at_once(draws * contexts, spec.batch_size)
        cached = length + contexts * (chunk - 1)
        width = {"fp32": 4, "bf16": 2}.get(teacher.precision, 2 if teacher.device == "cuda" else 4)
        kept = {term.name: term.bytes for term in terms}
        terms = [
            Term("teacher", kept["teacher"]),
            # While a layer's cache grows, its old one is there too.
            Term("kv", kv_bytes(shape, draws * cached, width) * (shape.layers + 1) // shape.layers),
            Term("activations", max(kept["activations"], activation_bytes(shape, draws * contexts) // shape.layers)),
            Term("logits", kept["logits"]),
            Term("attention", max(kept["attention"], 4 * contexts * cached * (draws * shape.heads + 1))),
        ]
    return MemoryPlan("continuations", (*terms, runtime(teacher.device)), tuple(unknown), *teacher.load)


PASS_TOKENS = 4096
"""Tokens of a pass, from which on more rows together gain nothing on a GPU, and cost as much memory each."""


def rows_at_once(tokens: int, most: int) -> int:
    """How many rows of so many ``tokens`` a pass a teacher in process computes together, ``most`` of them."""
    return max(1, min(most, PASS_TOKENS // max(1, tokens)))
