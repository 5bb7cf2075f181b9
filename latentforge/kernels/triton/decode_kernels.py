"""Decoding: the vocabulary's product in tiles, of which nothing is kept but each tile's maximum, sum and best token.

``decode_split`` takes a fixed stretch of the vocabulary for 16 rows, ``decode_join`` puts a row's stretches together in
their order. The stretches and the depth of a product's steps come from the configuration, never from the number of
rows: a row's bits do not depend on the others. ``decode_pick`` draws from what top-k and top-p leave; for these alone
the logits of a few rows at a time are kept in scratch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from latentforge.kernels.triton.logits import INF, INTERPRETED, NAN, shaped
from latentforge.kernels.triton.noise import gumbel

NOBODY = tl.constexpr(2**31 - 1)

SPLIT_INTEGERS = ["rows", "width", "vocab", "hidden_stride", "weight_stride", "splits"]
SPLIT_POINTERS = ["hidden", "weight", "scales", "bias", "seeds", "positions", "logits", "sums", "tokens"]


@triton.jit(do_not_specialize=SPLIT_INTEGERS, do_not_specialize_on_alignment=SPLIT_POINTERS)
def decode_split(
    hidden,  # [rows, width]
    weight,  # [at least vocab, width] bf16, fp32 or int8
    scales,  # [vocab] fp32 where int8, else None
    bias,  # [vocab], or None
    seeds,  # [rows] int64, or None: greedy
    positions,  # [rows] int64
    logits,  # [rows, vocab] fp32 scratch for z, or None
    sums,  # [4, rows, splits] fp32: maximum, sum, best score, its z / T
    tokens,  # [rows, splits] int32: the best token, NOBODY, or -1 where there is a NaN or plus infinity
    rows,
    width,
    vocab,
    hidden_stride,
    weight_stride,
    splits,
    temperature,
    logit_scale,
    soft_cap,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = n < rows
    split = tl.program_id(1)
    of_row = hidden + n.to(tl.int64)[:, None] * hidden_stride
    if seeds is not None:
        seed = tl.load(seeds + n, mask=here, other=0)[:, None]
        position = tl.load(positions + n, mask=here, other=0)[:, None]
    exact: tl.constexpr = INTERPRETED or hidden.dtype.element_ty == tl.float32 or weight.dtype.element_ty == tl.float32

    m = tl.full([ROWS], -INF, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    best = tl.full([ROWS], -INF, tl.float32)
    best_z = tl.full([ROWS], -INF, tl.float32)
    token = tl.full([ROWS], NOBODY, tl.int32)
    wrong = tl.zeros([ROWS], tl.int32)
    for step in range(STEPS):
        v = (split * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = v < vocab
        of_token = weight + v.to(tl.int64)[:, None] * weight_stride
        if ALIGNED:
            of_token = tl.multiple_of(of_token, [16, 16])
            of_row = tl.multiple_of(of_row, [16, 16])
        x = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, width, DEPTH):
            h = start + tl.arange(0, DEPTH)[None, :]
            deep = h < width
            if ALIGNED:
                deep = tl.max_constancy(deep, [1, 16])
            a = tl.load(of_row + h, mask=here[:, None] & deep, other=0.0)
            b = tl.load(of_token + h, mask=inside[:, None] & deep, other=0)
            if exact:
                # Triton's interpreter multiplies the bit patterns of bf16; a GPU has fp32 for fp32.
                x = tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), x, input_precision="ieee")
            else:
                # An int8 is exact in bf16.
                x = tl.dot(a, tl.trans(b.to(tl.bfloat16)), x)
        cols = v[None, :]
        if scales is not None:
            x *= tl.load(scales + v, mask=inside, other=0.0)[None, :]
        z = shaped(x, bias, cols, inside[None, :], logit_scale, soft_cap, SCALED, CAPPED)
        if logits is not None:
            at = n.to(tl.int64)[:, None] * vocab + cols
            tl.store(logits + at, z, mask=here[:, None] & inside[None, :])
        if seeds is not None:
            z = tl.div_rn(z, temperature + tl.zeros([ROWS, BLOCK], tl.float32))
        z = tl.where(inside[None, :], z, -INF)
        wrong = tl.maximum(wrong, tl.max(((z != z) | (z == INF)).to(tl.int32), 1))
        new = tl.maximum(m, tl.max(z, 1))
        base = tl.where(new == -INF, 0.0, new)
        total = total * tl.exp(tl.where(m == -INF, 0.0, m - new)) + tl.sum(tl.exp(z - base[:, None]), 1)
        m = new
        score = z
        if seeds is not None:
            score = z + gumbel(seed, position, cols)
        top = tl.max(score, 1)
        first = tl.min(tl.where((score == top[:, None]) & (score > -INF), cols, NOBODY), 1)
        better = top > best  # of equals the earlier, which is the lower id
        token = tl.where(better, first, token)
        best_z = tl.where(better, tl.max(tl.where(cols == first[:, None], z, -INF), 1), best_z)
        best = tl.where(better, top, best)
    at = n * splits + split
    field = rows * splits
    tl.store(sums + at, m, mask=here)
    tl.store(sums + field + at, total, mask=here)
    tl.store(sums + 2 * field + at, best, mask=here)
    tl.store(sums + 3 * field + at, best_z, mask=here)
    tl.store(tokens + at, tl.where(wrong > 0, -1, token), mask=here)


@triton.jit
def join(sums, tokens, row, rows, splits, PIECE: tl.constexpr):
    """(maximum, log of the sum, best score, its z / T, token, whether nothing is wrong) of a row's stretches."""
    field = rows * splits
    m = -INF
    total = tl.zeros([PIECE], tl.float32)
    best = tl.full([PIECE], -INF, tl.float32)
    best_z = tl.full([PIECE], -INF, tl.float32)
    token = tl.full([PIECE], NOBODY, tl.int32)
    lowest = tl.full([PIECE], NOBODY, tl.int32)
    for start in range(0, splits, PIECE):
        split = start + tl.arange(0, PIECE)
        inside = split < splits
        at = row * splits + split
        of_split = tl.load(sums + at, mask=inside, other=-INF)
        new = tl.maximum(m, tl.max(of_split, 0))
        base = tl.where(new == -INF, 0.0, new)
        share = tl.load(sums + field + at, mask=inside, other=0.0)
        total = total * tl.exp(tl.where(m == -INF, 0.0, m - new)) + share * tl.exp(of_split - base)
        m = new
        score = tl.load(sums + 2 * field + at, mask=inside, other=-INF)
        who = tl.load(tokens + at, mask=inside, other=NOBODY)
        lowest = tl.minimum(lowest, who)
        better = score > best
        best_z = tl.where(better, tl.load(sums + 3 * field + at, mask=inside, other=-INF), best_z)
        token = tl.where(better, who, token)
        best = tl.where(better, score, best)
    top = tl.max(best, 0)
    first = tl.min(tl.where(best == top, token, NOBODY), 0)
    z = tl.max(tl.where(token == first, best_z, -INF), 0)
    good = (tl.min(lowest, 0) >= 0) & (m > -INF)
    return m, tl.log(tl.sum(total, 0)), z, first, good


@triton.jit(do_not_specialize=["rows", "splits"], do_not_specialize_on_alignment=["sums", "tokens", "ids", "logprobs"])
def decode_join(sums, tokens, ids, logprobs, rows, splits, PIECE: tl.constexpr):
    """A row's token and its log-probability."""
    row = tl.program_id(0)
    m, log_total, z, token, good = join(sums, tokens, row, rows, splits, PIECE)
    tl.store(ids + row, tl.where(good, token, -1).to(tl.int64))
    tl.store(logprobs + row, tl.where(good, (z - m) - log_total, NAN))
