"""Which token-level student costs as much at inference as a latent one: a comparison at unequal cost says nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from latentforge.errors import RefusedError
from latentforge.students.causal import ModelShape
from latentforge.students.latent.flops import token_inference

TOLERANCE = 0.05
"""Inference costs that differ by no more are called equal."""

_STEP = 8  # intermediate sizes are multiples of it
_RATIOS = (1.0, 8.0)  # of intermediate size to width, between which a SwiGLU is one


class Matched(NamedTuple):
    """A size, its ``flops`` for a token, and by what share of the wanted cost they are above it (below: negative)."""

    shape: ModelShape
    flops: float
    difference: float


def matched_shape(flops: float, *, like: ModelShape, vocab_size: int, positions: int) -> Matched:
    """The token-level student of ``flops`` operations a token at ``positions``, within 5 %, that is most ``like`` one.

    It has as many layers and heads, and of the widths with which the cost can be met the one whose SwiGLU is most like.
    RefusedError where none can: the vocabulary's product alone may cost more.
    """
    wanted, step = like.intermediate / like.hidden, 2 * like.heads  # a head's width is even, for its rotation
    best, nearest, hidden = None, None, step
    while True:
        least, most = (_round(ratio * hidden) for ratio in _RATIOS)
        small = _cost(like, hidden, least, flops, vocab_size, positions)
        if nearest is not None and small.difference > TOLERANCE:
            break
        # The cost is linear in the intermediate size: 6 times layers and width for each.
        exact = least - small.difference * flops / (6.0 * like.layers * hidden)
        found = _cost(like, hidden, min(max(_round(exact), least), most), flops, vocab_size, positions)
        if nearest is None or abs(found.difference) < abs(nearest.difference):
            nearest = found
        if abs(found.difference) <= TOLERANCE and (best is None or _apart(found, wanted) < _apart(best, wanted)):
            best = found
        hidden += step
    if best is None:
        raise RefusedError(
            f"no token-level student of {like.layers} layers costs {flops:.3g} operations a token within "
            f"{TOLERANCE:.0%}: the nearest, of width {nearest.shape.hidden}, costs {nearest.flops:.3g}",
            next="take another number of layers",
        )
    return best


def _cost(like: ModelShape, hidden: int, intermediate: int, flops: float, vocab_size: int, positions: int) -> Matched:
    shape = replace(like, hidden=hidden, intermediate=intermediate)
    found = token_inference(shape, vocab_size=vocab_size, positions=positions).total
    return Matched(shape, found, found / flops - 1)


def _round(size: float) -> int:
    return max(_STEP, _STEP * round(size / _STEP))


def _apart(found: Matched, ratio: float) -> float:
    return abs(found.shape.intermediate / found.shape.hidden - ratio)
