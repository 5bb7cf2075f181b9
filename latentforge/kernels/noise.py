"""The noise of sampling, keyed by integers: the same bits for a (seed, position, vocabulary id) on every backend.

``csrc/gumbel.h`` is the same in C++ and CUDA. The bits come from Philox4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011); the key is the seed, the counter is (id >> 2, 0, position), and id & 3 picks the
word. What follows is made of IEEE fp32 additions, subtractions and multiplications, conversions and bit operations, in
this order and without fused multiply-adds, so that every implementation rounds alike.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# log(1 + f) - f + f^2 / 2 over f^3, from Cephes' logf, highest power first.
_LOG_POLYNOMIAL = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # the first is exact in 9 bits
_SQRT_HALF_BITS = 0x3F3504F3


def philox_words(seeds: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """The 32 random bits of each (seed, position, id), as int64 in [0, 2^32); the three int64 tensors are broadcast."""
    shape = torch.broadcast_shapes(seeds.shape, positions.shape, ids.shape)
    seeds, positions, ids = (x.expand(shape) for x in (seeds, positions, ids))
    key = [seeds & _MASK, (seeds >> 32) & _MASK]
    counter = [(ids >> 2) & _MASK, torch.zeros_like(ids), positions & _MASK, (positions >> 32) & _MASK]
    for _ in range(10):
        # The products of unsigned halves wrap in int64; their bits are right, a mask takes the sign off.
        first, second = counter[0] * _MULTIPLIERS[0], counter[2] * _MULTIPLIERS[1]
        counter = [
            ((second >> 32) & _MASK) ^ counter[1] ^ key[0],
            second & _MASK,
            ((first >> 32) & _MASK) ^ counter[3] ^ key[1],
            first & _MASK,
        ]
        key = [(half + step) & _MASK for half, step in zip(key, _WEYL, strict=True)]
    return torch.stack(counter, dim=-1).gather(-1, (ids & 3).unsqueeze(-1)).squeeze(-1)


def philox_blocks(
    seeds: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], blocks: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    """The words [N, M, 4] of ids 4b to 4b + 3 for each seed and position [N] and each block b [M] of four ids.

    The same bits as ``philox_words``, for the few numbers of a draw on the host: in numpy a round takes a few
    microseconds, where a tensor's operations take ten times as long.
    """
    mask, half = np.uint64(_MASK), np.uint64(32)
    # (count, N, M): words 0 and 2 of the counter are multiplied, words 1 and 3 are not.
    shape = (len(seeds), len(blocks))
    zero = np.zeros(shape, dtype=np.uint64)
    places = positions.view(np.uint64)[:, None]
    even = np.stack([zero + (blocks.view(np.uint64) & mask), zero + (places & mask)])
    odd = np.stack([zero, zero + (places >> half)])
    key = seeds.view(np.uint64)
    keys = np.stack([key & mask, key >> half])[..., None]
    multipliers = np.array(_MULTIPLIERS, dtype=np.uint64)[:, None, None]
    weyl = np.array(_WEYL, dtype=np.uint64)[:, None, None]
    for _ in range(10):
        products = even * multipliers
        even, odd = (products >> half)[::-1] ^ odd ^ keys, (products & mask)[::-1]
        keys = (keys + weyl) & mask
    return np.stack([even[0], odd[0], even[1], odd[1]], axis=-1)


def unit_interval(words: Tensor) -> Tensor:
    """(w + 1/2) / 2^32 as fp32, rounded once: both halves are exact, so is the scaling."""
    high = (words >> 16).float() * 65536.0
    low = (words & 0xFFFF).float() + 0.5
    return (high + low) * 2.0**-32


def _split_log(x: Tensor) -> tuple[Tensor, Tensor]:
    """(k, f) with x = 2^k (1 + f) and 1 + f in [sqrt(1/2), sqrt(2)), for normal x > 0."""
    bits = x.view(torch.int32)
    power = (bits - _SQRT_HALF_BITS) >> 23
    return power.float(), (bits - (power << 23)).view(torch.float32) - 1.0


def _log_parts(k: Tensor, f: Tensor) -> Tensor:
    """k log 2 + log(1 + f)."""
    square = f * f
    p = torch.full_like(f, _LOG_POLYNOMIAL[0])
    for coefficient in _LOG_POLYNOMIAL[1:]:
        p = p * f
        p = p + coefficient
    y = (p * f) * square
    y = y + k * _LN2_LOW
    y = y - 0.5 * square
    return (f + y) + k * _LN2_HIGH


def gumbel_of_words(words: Tensor) -> Tensor:
    """-log(-log1p(-t)) of t = (w + 1/2) / 2^32 as fp32, within 1e-6 (relative above 1); from -3.2 to 22.9.

    From t = 1/4 on, 1 - t comes from the complement of the bits: nothing cancels.
    """
    small = words < 0x40000000
    x = unit_interval(torch.where(small, words, words ^ _MASK))
    k, f = _split_log(x)
    exponential = 0.0 - _log_parts(torch.where(small, 0.0, k), torch.where(small, 0.0 - x, f))
    k, f = _split_log(exponential)
    return 0.0 - _log_parts(k, f)


def gumbel(seeds: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise, fp32, of int64 seeds, positions and vocabulary ids, which are broadcast."""
    return gumbel_of_words(philox_words(seeds, positions, ids))
