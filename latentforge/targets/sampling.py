"""Targets drawn from a teacher: unbiased at any number of draws, where a cut top-k is biased at any k.

A row holds the distinct tokens of ``draws`` draws from the teacher's distribution at T = 1, with logprob
log(count / draws), and nothing outside (tail minus infinity). The KD gradient is linear in the teacher's
probabilities, softmax(s) - p, so its mean over seeds is the full one (Anshumann et al. 2025, arXiv:2503.16870). The KD
*value* is not: it lacks the entropy that few draws cannot show. A row that was drawn cannot be cut to fewer entries,
tempered, or used for reverse KL.

The draws are stratified: draw j falls into the j-th of ``draws`` equal parts of the cumulated probabilities, so every
token is drawn ``draws`` times its probability on average, and never more spread than independent draws would be. The
uniforms come from ``kernels.noise``'s integers, keyed by (seed and tokens of the sequence, position, draw), and the
cumulated probabilities are integers, whose sums have no order: the same logits give the same rows on any device, in any
batch, in whatever order sequences are asked.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.noise import philox_words

# The weight of the likeliest token as an integer: the sum of 2^18 such stays below 2^63, and what rounding them down
# takes from all others together below 2e-8 of the whole.
_UNITS = 2.0**44
# Logits in fp64 at a time: on a host as many as its cache holds, on a GPU enough to keep it busy.
_CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}


@dataclass(frozen=True)
class Sampling:
    """How rows are drawn: ``draws`` a position (at least 1), and the ``seed`` (any whole number)."""

    draws: int
    seed: int

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise RefusedError(
                f"draws = {self.draws}: at least one draw a position is needed", next="raise score.draws"
            )

    def width(self, vocab_size: int) -> int:
        """Entries a row: as many distinct tokens as there can be; fewer are filled up with absent ones."""
        return min(self.draws, vocab_size)

    def key(self, tokens: npt.NDArray[np.integer]) -> int:
        """The noise's key of one sequence, int64: of its tokens, not of its place in a data set or a batch."""
        content = np.ascontiguousarray(tokens, dtype="<i8").tobytes()
        digest = hashlib.sha256(f"drawn targets {self.seed} ".encode() + content).digest()
        return int.from_bytes(digest[:8], "little", signed=True)

    def rows(self, logits: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Draw each row: ids int32 ``[N, width]``, logprobs float32 ``[N, width]``, likeliest first, then by id.

        ``logits`` ``[N, V]``, any float dtype, minus infinity for padding of the vocabulary; ``keys`` and ``positions``
        int64 ``[N]``: :meth:`key` of the row's sequence, and the row's place in it. Refused where a row is no
        distribution. Chunked: beside the result some MiB, on a GPU 128.
        """
        n, vocabulary = logits.shape
        if n == 0:
            nothing = logits.new_empty(0, self.width(vocabulary))
            return nothing.to(torch.int32), nothing.float()
        aims = self._uniforms(keys, positions)
        drawn = torch.empty(n, self.draws, dtype=torch.int64, device=logits.device)
        rows = min(n, max(1, _CHUNK_BYTES.get(logits.device.type, 64 << 20) // (8 * vocabulary)))
        # Made once: a host spends more time on fresh pages than on the sums in them.
        weights = torch.empty(rows, vocabulary, dtype=torch.float64, device=logits.device)
        whole = torch.empty(rows, vocabulary, dtype=torch.int64, device=logits.device)
        for at in range(0, n, rows):
            part = slice(at, min(at + rows, n))
            cumulated = _cumulated(logits[part], weights[: part.stop - at], whole[: part.stop - at])
            total = cumulated[:, -1:]
            aim = torch.minimum((aims[part] * total).to(torch.int64), total - 1)
            drawn[part] = torch.searchsorted(cumulated, aim, right=True)
        ids, counts = _counted(drawn)
        width = self.width(vocabulary)
        return ids[:, :width].to(torch.int32), (counts[:, :width].double() / self.draws).log().float()

    def _uniforms(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Where in [0, 1) each draw of each row falls, fp64 ``[N, draws]``, ascending: one in each stratum."""
        numbers = torch.arange(2 * self.draws, device=keys.device)
        words = philox_words(keys[:, None], positions[:, None], numbers)
        inside = ((words[:, 0::2] << 21) | (words[:, 1::2] >> 11)).double() * 2.0**-53
        return (numbers[: self.draws] + inside) / self.draws


def _counted(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct tokens of each row of ``drawn`` ([n, draws], ascending), then -1; how often each came, then 0."""
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = first.cumsum(dim=-1) - 1
    counts = torch.zeros_like(drawn).scatter_add_(1, place, torch.ones_like(drawn))
    distinct = torch.full_like(drawn, -1).scatter_(1, place, drawn)
    counts, order = counts.sort(dim=-1, descending=True, stable=True)
    return distinct.gather(1, order), counts


def _cumulated(logits: Tensor, weights: Tensor, whole: Tensor) -> Tensor:
    """Cumulated probabilities of each row in units of which the likeliest token has 2^44, int64, put into ``whole``."""
    weights.copy_(logits)
    top = weights.amax(dim=-1, keepdim=True)
    if not bool(top.isfinite().all()):
        raise RefusedError(
            "the teacher answered with logits of which no distribution can be made: nothing to draw from"
        )
    whole.copy_(weights.sub_(top).exp_().mul_(_UNITS))
    return whole.cumsum_(dim=-1)
