"""What an operator must move and compute at least: the bytes and operations behind "percent of the floor".

Bytes are those of tensors that cannot stay in a cache: each is counted once for each time that the best algorithm known
here must read or write it. Operations are counted per logit, each exponential, logarithm, multiply-add, comparison or
addition as one; they say what kind of machine could reach the floor, not how fast this one is.
"""

from __future__ import annotations

from dataclasses import dataclass

# Per logit, each softmax with one exponential, one subtraction, one multiplication by 1/T and one addition to its sum.
# Dense adds a multiply-add and a subtraction for the divergence and, for the gradient, two normalisations and a
# difference; CE adds a second exponential of the student with its sum and a multiply-add into the gradient. Top-k needs
# one softmax and one normalisation: what happens at k places does not count.
_SOFTMAX, _DENSE_LOSS, _DENSE_GRADIENT, _TOPK_GRADIENT, _CE = 4, 2, 3, 1, 3


@dataclass(frozen=True)
class Floor:
    """``bytes`` that move at the speed of ``stream``, ``flops`` as counted above; ``formula`` says how."""

    bytes: int
    flops: int
    stream: str
    formula: str


def dense_kd(rows: int, vocab: int, element: int, *, ce: bool) -> Floor:
    """Read both logits, write the gradient over the student's: the traffic of a += b."""
    per_logit = 2 * _SOFTMAX + _DENSE_LOSS + _DENSE_GRADIENT + (_CE if ce else 0)
    return Floor(3 * rows * vocab * element, per_logit * rows * vocab, "add", f"3·N·V·{element} B")


def topk_kd(rows: int, vocab: int, element: int, *, ce: bool) -> Floor:
    """Read the logits, write the gradient over them: the traffic of a *= 2; k entries a row weigh nothing beside V."""
    per_logit = _SOFTMAX + _TOPK_GRADIENT + (_CE if ce else 0)
    return Floor(2 * rows * vocab * element, per_logit * rows * vocab, "scale", f"2·N·V·{element} B")


def decode(rows: int, vocab: int, hidden: int, element: int) -> Floor:
    """Read the weight once, whatever the number of rows (int8 with its fp32 scale a token)."""
    scales = 4 * vocab if element == 1 else 0
    formula = f"V·H·{element} B" + (" + V·4 B" if scales else "")
    return Floor(vocab * hidden * element + scales, 2 * rows * vocab * hidden, "read", formula)


def linear_kd(rows: int, vocab: int, hidden: int, element: int, *, teacher_hidden: int | None = None) -> Floor:
    """Weight read for the logits and for d_hidden, d_weight written, hidden rows in and out; the teacher's read once.

    The operations are those of the products alone: three of N·V·H for the student and one for a teacher's layer.
    """
    student = 3 * vocab * hidden + 3 * rows * hidden
    teacher = 0 if teacher_hidden is None else vocab * teacher_hidden + rows * teacher_hidden
    flops = 6 * rows * vocab * hidden + (0 if teacher_hidden is None else 2 * rows * vocab * teacher_hidden)
    formula = f"(3·V·H + 3·N·H{'' if teacher_hidden is None else ' + V·H_t + N·H_t'})·{element} B"
    return Floor((student + teacher) * element, flops, "copy", formula)
