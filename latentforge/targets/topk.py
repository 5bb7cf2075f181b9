"""Top-k rows with exact tails from a teacher's dense logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.targets.row import SequenceTargets

_CHUNK_BYTES = 64 << 20


def topk_rows(logits: Tensor, k: int, temperatures: Sequence[float]) -> tuple[Tensor, Tensor, dict[float, Tensor]]:
    """The k largest log-probabilities of each row and the log of what lies outside, at each temperature.

    ``logits`` ``[N, V]``, any float dtype, minus infinity for vocabulary padding. Returns ids int32 ``[N, k]``,
    logprobs float32 ``[N, k]`` (T = 1, descending; equal ones by ascending id) and for each T the tail float32
    ``[N]`` = log Σ exp(logp / T) over the tokens outside. The outside is summed, never taken as 1 - inside: where the
    top-k hold nearly everything, that difference would be rounding noise. Chunked: beside the result about 64 MiB.
    """
    n, vocabulary = logits.shape
    if not 1 <= k <= vocabulary:
        raise RefusedError(f"k = {k} does not fit a vocabulary of {vocabulary} tokens", next="lower score.k")
    ids = torch.empty(n, k, dtype=torch.int32, device=logits.device)
    logprobs = torch.empty(n, k, dtype=torch.float32, device=logits.device)
    tails = {float(t): torch.empty(n, dtype=torch.float32, device=logits.device) for t in temperatures}
    rows = max(1, _CHUNK_BYTES // (4 * vocabulary))
    for at in range(0, n, rows):
        part = torch.log_softmax(logits[at : at + rows].float(), dim=-1)
        values, chosen = torch.topk(part, k, dim=-1)
        # topk leaves the order of equal values open: by id first, then stably by value, makes it one order.
        tied = (values[:, 1:] == values[:, :-1]).any(dim=-1).nonzero().squeeze(-1)
        if tied.numel():
            some, by_id = torch.sort(chosen[tied], dim=-1)
            _, by_value = torch.sort(values[tied].gather(-1, by_id), dim=-1, descending=True, stable=True)
            chosen[tied] = some.gather(-1, by_value)
        ids[at : at + rows] = chosen.to(torch.int32)
        logprobs[at : at + rows] = values
        part.scatter_(-1, chosen, float("-inf"))
        for temperature, tail in tails.items():
            tail[at : at + rows] = torch.logsumexp(part if temperature == 1.0 else part / temperature, dim=-1)
    return ids, logprobs, tails


def sequence_rows(
    ids: Tensor, logprobs: Tensor, tails: dict[float, Tensor], *, sequences: int
) -> list[SequenceTargets]:
    """Split flat rows ``[B·(L-1), k]`` (row-major) into one :class:`SequenceTargets` a sequence."""
    if ids.shape[0] % sequences:
        raise RefusedError(f"{ids.shape[0]} target rows do not split into {sequences} sequences")
    positions, k = ids.shape[0] // sequences, ids.shape[1]
    flat_ids = ids.to("cpu", torch.int32).numpy().reshape(sequences, positions, k)
    flat_logprobs = logprobs.to("cpu", torch.float32).numpy().reshape(sequences, positions, k)
    flat_tails = {t: tail.to("cpu", torch.float32).numpy().reshape(sequences, positions) for t, tail in tails.items()}
    return [
        SequenceTargets(
            np.ascontiguousarray(flat_ids[b]),
            np.ascontiguousarray(flat_logprobs[b]),
            {t: np.ascontiguousarray(tail[b]) for t, tail in flat_tails.items()},
        )
        for b in range(sequences)
    ]
