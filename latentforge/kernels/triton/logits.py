"""What both losses do with a logit: shape it, take powers of it, weigh it, and differentiate it."""

from __future__ import annotations

import triton
import triton.language as tl

from latentforge.kernels.triton import interpreted

INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def row_of(logits, row, stride, ALIGNED: tl.constexpr):
    """The row's address. ALIGNED is the caller's word: addresses of 16 bytes, strides and vocabulary of 16 elements."""
    here = logits + row * stride
    if ALIGNED:
        here = tl.multiple_of(here, 16)
    return here


@triton.jit
def below(cols, limit, ALIGNED: tl.constexpr):
    """cols < limit, for a limit of a multiple of 16 where ALIGNED: then whole vectors are in or out."""
    inside = cols < limit
    if ALIGNED:
        inside = tl.max_constancy(inside, 16)
    return inside


@triton.jit
def rounded(x, like):
    """fp32 as the element type of the pointer ``like``, to nearest even. Triton's interpreter cuts bf16 off instead."""
    if INTERPRETED and like.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(like.dtype.element_ty)


@triton.jit
def tanh(x):
    """Within 2 units in the last place (Cephes' tanhf): the definition by exponentials loses small x."""
    z = x * x
    p = ((((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z) + 1.33314422036e-1) * z
    small = (p - 3.33332819422e-1) * z * x + x
    size = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    # A NaN takes the first branch: it must stay one.
    return tl.where(size > 0.625, tl.where(x < 0, -large, large), small)


@triton.jit
def shaped(x, bias, cols, inside, logit_scale, soft_cap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """``cap * tanh(scale * (x + bias) / cap)`` in fp32; minus infinity stays."""
    s = x.to(tl.float32)
    if bias is not None:
        s += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        s *= logit_scale
    if CAPPED:
        s = tl.where(s == -INF, s, soft_cap * tanh(s / soft_cap))
    return s


@triton.jit
def over_raw(gradient, s, logit_scale, soft_cap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """A gradient over s as the gradient over the raw logit."""
    if CAPPED:
        ratio = s / soft_cap
        gradient *= tl.where(s == -INF, 0.0, 1.0 - ratio * ratio)
    if SCALED:
        gradient *= logit_scale
    return gradient


@triton.jit
def at_one(e, d, ROOT: tl.constexpr):
    """exp(d) where ``e`` is exp(d / T): a power of it for T = ROOT in 1, 2, 4, else (ROOT = 0) an exponential."""
    if ROOT == 0:
        return tl.exp2(d * LOG2_E)
    if ROOT == 1:
        return e
    square = e * e
    if ROOT == 2:
        return square
    return square * square


@triton.jit
def raised(old, new):
    """(what to subtract, old - new) for a running maximum that went from ``old`` to ``new``; 0 while there is none."""
    return tl.where(new == -INF, 0.0, new), tl.where(old == -INF, 0.0, old - new)
