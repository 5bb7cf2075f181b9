"""Small integers as bytes that compress and bits that do not: the code of every number in a stored row.

A value below 16 is its own *token*; a larger one has a token for its magnitude, and the bits below its leading one are
kept as they are. Tokens are skewed and go through zstd, the bits are packed one after the other, lowest first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

DIRECT = 16
OFFSET = 12
"""A token from ``DIRECT`` on has ``token - OFFSET`` bits: 16 stands for 16..31 and has 4."""

LARGEST = (1 << 24) - 1
LARGEST_TOKEN = 23 + OFFSET

Tokens = npt.NDArray[np.uint8]
Bits = npt.NDArray[np.bool_]


def split(values: npt.NDArray[Any]) -> tuple[Tokens, Bits]:
    """Tokens uint8 ``[n]`` of integers ``[n]`` between 0 and 2^24 - 1, and the bits that they leave."""
    wide = values.astype(np.int64)
    magnitude = np.frexp(wide.astype(np.float64))[1].astype(np.int64) - 1
    large = wide >= DIRECT
    tokens = np.where(large, OFFSET + magnitude, wide).astype(np.uint8)
    rest, width = wide[large], magnitude[large]
    places = np.arange(int(width.max()) if width.size else 0)
    bits = ((rest[:, None] >> places) & 1).astype(bool)
    return tokens, bits[places[None, :] < width[:, None]]


def join(tokens: Tokens, bits: npt.NDArray[np.uint8], at: int) -> tuple[npt.NDArray[np.int32], int]:
    """The integers of ``tokens`` ``[n]`` whose bits begin at bit ``at`` of the packed ``bits``; and where they end."""
    width = np.where(tokens < DIRECT, 0, tokens.astype(np.int64) - OFFSET)
    ends = at + np.cumsum(width)
    end = int(ends[-1]) if len(ends) else at
    padded = np.concatenate([bits, np.zeros(4, np.uint8)])
    starts = ends - width
    byte, shift = starts >> 3, starts & 7
    window = padded[byte].astype(np.int64)
    for more in (1, 2, 3):
        window |= padded[byte + more].astype(np.int64) << (8 * more)
    low = (window >> shift) & ((1 << width) - 1)
    return np.where(tokens < DIRECT, tokens, (1 << width) | low).astype(np.int32), end
