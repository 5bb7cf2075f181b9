"""What autograd keeps of a decoder between forward and backward, and the scores of its attention.

Activation bytes a token are those of transformers' Qwen3 with SDPA, rounded up; a test holds them against the tensors
that torch really saves.
"""

from __future__ import annotations

from dataclasses import dataclass

from latentforge.memory.shape import ModelShape


@dataclass(frozen=True)
class _Bytes:
    """Bytes a unit of width that one layer keeps for the backward pass of one token, and those of one number."""

    hidden: float
    query: float
    kv: float
    intermediate: float
    number: float


_SAVED = {"fp32": _Bytes(24, 16, 17, 16, 4), "bf16": _Bytes(20, 10.5, 10.5, 8, 2)}


def activation_bytes(shape: ModelShape, tokens: int, precision: str = "fp32", *, recomputed: bool = False) -> int:
    """Bytes kept between forward and backward of the decoder for ``tokens`` tokens in flight, logits not counted. Of
    layers that are ``recomputed`` for the gradient their inputs alone are kept."""
    unit = _SAVED[precision]
    layer = (
        unit.hidden * shape.hidden
        + unit.query * shape.query_width
        + unit.kv * shape.kv_width
        + unit.intermediate * shape.intermediate
    )
    if recomputed:
        layer = unit.number * shape.hidden
    return int(tokens * (shape.layers * layer + 3 * 4 * shape.hidden))


def attention_bytes(shape: ModelShape, rows: int, length: int) -> int:
    """Bytes of one layer's scores in fp32, kept twice (scores and softmax), for ``rows`` sequences of the length that
    is really used, never of the longest position that the model admits."""
    return 2 * 4 * rows * shape.heads * length * length


def kv_bytes(shape: ModelShape, tokens: int, width: int = 2) -> int:
    """Bytes of the keys and values that a teacher keeps for ``tokens`` tokens (``width`` bytes a number) while it goes
    on with a text, here or as a server; one in process that answers whole rows keeps none.
    """
    return 2 * shape.layers * shape.kv_width * width * tokens
