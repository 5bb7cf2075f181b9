"""Chunks of K tokens: a row cut into them, and which of their places hold a token.

Each document begins at the first place of a chunk and ends in EOS; the places after that EOS, up to the end of its
chunk, are padding, stored as the EOS id again. Padding is not part of the text: it is out of every loss and metric,
and no model is shown it.
"""

from __future__ import annotations

from torch import Tensor

from latentforge.errors import RefusedError


def chunked(tokens: Tensor, chunk: int) -> Tensor:
    """Rows of tokens int64 [..., L] as chunks [..., L / chunk, chunk], a view where torch can give one.

    RefusedError where ``chunk`` is no size, or L is not a multiple of it: a chunk is never cut.
    """
    length = tokens.shape[-1]
    if chunk < 1 or length % chunk:
        raise RefusedError(
            f"rows of {length} tokens do not split into chunks of {chunk}",
            next="set data.sequence_length to a multiple of data.chunk",
        )
    return tokens.unflatten(-1, (length // chunk, chunk))


def valid(chunks: Tensor, eos_id: int) -> Tensor:
    """Which places of chunks int64 [..., K] hold a token, bool [..., K]: all up to the first EOS, it included."""
    is_eos = (chunks == eos_id).long()
    return is_eos.cumsum(-1) == is_eos


def absorbed(tokens: Tensor, eos_id: int) -> Tensor:
    """``tokens`` int64 [..., L] with what follows the first EOS of each row replaced by EOS."""
    return tokens.masked_fill(~valid(tokens, eos_id), eos_id)
