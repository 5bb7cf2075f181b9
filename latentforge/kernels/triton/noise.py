"""The noise of sampling in Triton: the bits of ``latentforge.kernels.noise``, operation by operation.

Kernels that use it are compiled with ``enable_fp_fusion=False``: a fused multiply-add would round once where the
definition rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_word(seed, position, ids):
    """The 32 random bits, uint32, of int64 ``seed`` and ``position`` and int32 ``ids``, which are broadcast."""
    group = (ids >> 2).to(tl.uint32)
    zero = group ^ group
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = group + (k0 ^ k0)
    c1 = zero + (k0 ^ k0)
    c2 = zero + position.to(tl.uint32)
    c3 = zero + (position >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        first = c0.to(tl.uint64) * 0xD2511F53
        second = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (second >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (first >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = second.to(tl.uint32)
        c3 = first.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    which = ids & 3
    return tl.where(which == 0, c0, tl.where(which == 1, c1, tl.where(which == 2, c2, c3)))


@triton.jit
def log_parts(k, f):
    """k log 2 + log(1 + f)."""
    square = f * f
    p = f * 7.0376836292e-2 + -1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f + -1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f + -1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f + -2.4999993993e-1
    p = p * f + 3.3333331174e-1
    y = (p * f) * square
    y = y + k * -2.12194440e-4
    y = y - 0.5 * square
    return (f + y) + k * 0.693359375


@triton.jit
def split_log(x):
    """(k, f) with x = 2^k (1 + f) and 1 + f in [sqrt(1/2), sqrt(2)), for normal x > 0."""
    bits = x.to(tl.int32, bitcast=True)
    power = (bits - 0x3F3504F3) >> 23
    return power.to(tl.float32), (bits - (power << 23)).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def gumbel(seed, position, ids):
    """Standard Gumbel noise, fp32: -log(-log1p(-t)) of t = (word + 1/2) / 2^32."""
    word = philox_word(seed, position, ids)
    small = word < 0x40000000
    bits = tl.where(small, word, ~word)
    high = (bits >> 16).to(tl.float32) * 65536.0
    low = (bits & 0xFFFF).to(tl.float32) + 0.5
    x = (high + low) * 2.3283064365386963e-10
    k, f = split_log(x)
    exponential = 0.0 - log_parts(tl.where(small, 0.0, k), tl.where(small, 0.0 - x, f))
    k, f = split_log(exponential)
    return 0.0 - log_parts(k, f)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["seeds", "positions", "ids", "out"])
def noise(seeds, positions, ids, out, count, BLOCK: tl.constexpr):
    """``gumbel`` of [count] int64 seeds, int64 positions and int32 ids, for those who compare bits."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    seed = tl.load(seeds + at, mask=inside, other=0)
    position = tl.load(positions + at, mask=inside, other=0)
    tl.store(out + at, gumbel(seed, position, tl.load(ids + at, mask=inside, other=0)), mask=inside)
