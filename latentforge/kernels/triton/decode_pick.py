"""The draw from what top-k and top-p leave of a row, exactly: one program a row over its logits in scratch.

The tokens in the order of their logits, of equals the lower id first, are cut after a prefix: all logits above a
threshold and the first few equal to it. The threshold is found by its 32 bits, four at a time, from counts (top-k) and
from masses in 64-bit integers (top-p), which add up to the same in any order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from latentforge.kernels.triton.decode_kernels import NOBODY, join
from latentforge.kernels.triton.logits import INF, NAN
from latentforge.kernels.triton.noise import gumbel

UNIT = tl.constexpr(float(2**44))  # of the mass: 2^18 tokens of at most this stay below 2^63


@triton.jit
def ordered(z):
    """Integers from 0 on, in the order of the floats; both zeros are one."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    flipped = bits ^ ((bits >> 31) | -2147483648)
    return flipped.to(tl.int64) & 0xFFFFFFFF


@triton.jit
def measured(logits, cols, vocab, m, temperature, BY_MASS: tl.constexpr):
    """(key, weight) of some tokens: what orders them, and 1 or their share of the mass."""
    inside = cols < vocab
    z = tl.load(logits + cols, mask=inside, other=-INF)
    if BY_MASS:
        share = tl.exp(tl.div_rn(z, temperature + tl.zeros_like(z)) - m)
        return ordered(z), tl.where(inside, (share * UNIT).to(tl.int64), 0)
    return ordered(z), inside.to(tl.int64)


@triton.jit
def threshold(logits, vocab, goal, m, temperature, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """(the largest key such that the tokens from it on weigh ``goal``, the weight above it, its own)."""
    x = tl.full([1], 0, tl.int64)
    digits = tl.arange(0, 16).to(tl.int64)
    for place in range(8):
        candidates = x + (digits << (28 - 4 * place))
        weights = tl.zeros([16], tl.int64)
        for start in range(0, vocab, BLOCK):
            key, weight = measured(logits, start + tl.arange(0, BLOCK), vocab, m, temperature, BY_MASS)
            weights += tl.sum(tl.where(key[None, :] >= candidates[:, None], weight[None, :], 0), 1)
        x += (tl.sum((weights >= goal).to(tl.int64), 0) - 1) << (28 - 4 * place)
    above = tl.full([1], 0, tl.int64)
    own = tl.full([1], 0, tl.int64)
    for start in range(0, vocab, BLOCK):
        key, weight = measured(logits, start + tl.arange(0, BLOCK), vocab, m, temperature, BY_MASS)
        above += tl.sum(tl.where(key > x, weight, 0), 0)
        own = tl.maximum(own, tl.max(tl.where(key == x, weight, 0), 0))
    return tl.max(x, 0), tl.max(above, 0), tl.max(own, 0)


@triton.jit(
    do_not_specialize=["rows", "vocab", "splits", "top_k"],
    do_not_specialize_on_alignment=["logits", "seeds", "positions", "sums", "tokens", "ids", "logprobs"],
)
def decode_pick(
    logits,  # [rows, vocab] fp32
    seeds,  # [rows] int64
    positions,  # [rows] int64
    sums,  # what decode_split left
    tokens,
    ids,  # [rows] int64
    logprobs,  # [rows] fp32
    rows,
    vocab,
    splits,
    top_k,  # at most vocab
    top_p,  # as the sum of two fp32 numbers
    top_p_rest,
    temperature,
    CUT_P: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    row = tl.program_id(0)
    m, log_total, _, _, good = join(sums, tokens, row, rows, splits, PIECE)
    m = tl.where(good, m, 0.0)
    logits += row.to(tl.int64) * vocab
    read = tl.where(good, vocab, 0)
    x, above, _ = threshold(logits, read, top_k, m, temperature, False, BLOCK)
    ties = top_k - above
    if CUT_P:
        mass = tl.full([1], 0, tl.int64)
        one = tl.full([1], 0, tl.int64)
        for start in range(0, read, BLOCK):
            key, weight = measured(logits, start + tl.arange(0, BLOCK), vocab, m, temperature, True)
            mass += tl.sum(tl.where(key > x, weight, 0), 0)
            one = tl.maximum(one, tl.max(tl.where(key == x, weight, 0), 0))
        kept = tl.max(mass + ties * one, 0).to(tl.float64)
        wanted = kept * top_p + kept * top_p_rest
        goal = tl.maximum(tl.ceil(wanted).to(tl.int64), 1)
        y, before, own = threshold(logits, read, goal, m, temperature, True, BLOCK)
        needed = (goal - before + own - 1) // tl.maximum(own, 1)
        ties = tl.where(y == x, tl.minimum(ties, needed), needed)
        x = y
    seed = tl.load(seeds + row)
    position = tl.load(positions + row)
    best = -INF
    best_z = -INF
    token = NOBODY + 0
    seen = tl.full([1], 0, tl.int32)
    for start in range(0, read, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(logits + cols, mask=cols < vocab, other=-INF)
        key = ordered(z)
        tie = (key == x).to(tl.int32)
        allowed = (key > x) | ((key == x) & (seen + tl.cumsum(tie, 0) <= ties))
        seen += tl.sum(tie, 0)
        scaled = tl.div_rn(z, temperature + tl.zeros_like(z))
        score = tl.where(allowed & (z > -INF) & (cols < vocab), scaled + gumbel(seed, position, cols), -INF)
        top = tl.max(score, 0)
        first = tl.min(tl.where((score == top) & (score > -INF), cols, NOBODY), 0)
        better = top > best
        token = tl.where(better, first, token)
        best_z = tl.where(better, tl.max(tl.where(cols == first, scaled, -INF), 0), best_z)
        best = tl.where(better, top, best)
    tl.store(ids + row, tl.where(good, token, -1).to(tl.int64))
    tl.store(logprobs + row, tl.where(good, (best_z - m) - log_total, NAN))
