"""A latent student against held-out text: what it says after each chunk, to be scored by BrierLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.students.latent.backbone import StateCache
from latentforge.students.latent.brier import ORDERS, roll_out
from latentforge.students.latent.chunks import absorbed, chunked, valid
from latentforge.students.latent.requests import Keys
from latentforge.students.latent.session import LatentModel


class Continuations(NamedTuple):
    """M contexts, row by row: ``samples`` int64 [M, N, 4] drawn after each, ``truth`` int64 [M, 4] of the text;
    ``rows`` and ``places`` int64 [M] say which, the state after chunk ``places`` of that row. On the CPU."""

    samples: Tensor
    truth: Tensor
    rows: Tensor
    places: Tensor


@torch.no_grad()
def continuations(
    model: LatentModel,
    chunks: Tensor,
    *,
    draws: int,
    seed: int = 0,
    most_rows: int = 4096,
    beside: Tensor | None = None,
) -> Continuations:
    """``draws`` (N) continuations of four tokens after each chunk of rows ``chunks`` int64 [B, C, K], at temperature 1.

    A context is a chunk after which the row holds four more places; what follows the end of the text there is EOS
    again, in samples too. The context of a place is the row up to it. For K < 4 a draw goes on after its own tokens.
    ``seed`` and a context's row and place key its draws. At most ``most_rows`` texts are computed at once. Where draws
    are compared with those of a teacher too, ``beside`` int64 [M, R, 4] are these, of the same contexts in this order.

    Scores: ``brier_lm(sample_scores(found.samples, found.truth), groups=found.rows)``.
    """
    if chunks.ndim != 3 or chunks.shape[2] != model.chunk:
        raise RefusedError(f"chunks are {list(chunks.shape)}, not [B, C, {model.chunk}]")
    ahead = -(-ORDERS // model.chunk)
    if chunks.shape[1] <= ahead:
        raise RefusedError(f"rows of {chunks.shape[1]} chunks of {model.chunk}: no chunk has {ORDERS} tokens after it")
    size = max(1, most_rows // draws)
    places = chunks.shape[1] - ahead
    if beside is not None and len(beside) != len(chunks) * places:
        raise RefusedError(f"beside holds draws of {len(beside)} contexts, the rows have {len(chunks) * places}")
    texts = None if beside is None else beside.unflatten(0, (-1, places))
    parts = [
        _of_rows(
            model,
            chunks[start : start + size],
            start,
            ahead,
            draws,
            seed,
            None if texts is None else texts[start : start + size],
        )
        for start in range(0, len(chunks), size)
    ]
    return Continuations(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _of_rows(
    model: LatentModel, chunks: Tensor, start: int, ahead: int, draws: int, seed: int, beside: Tensor | None
) -> Continuations:
    """The contexts of a block of rows, the first of which is number ``start``: place after place, with a cache."""
    count, length, _ = chunks.shape
    holds, cache = valid(chunks, model.eos_id), StateCache()
    found = []
    for place in range(length - ahead):
        added = chunks[:, place : place + 1].to(model.device)
        states = model.student.states(added, holds[:, place : place + 1].to(model.device), cache)[:, -1]
        truth = absorbed(chunks[:, place + 1 : place + 1 + ahead].flatten(1), model.eos_id)[:, :ORDERS]
        rows = torch.arange(start, start + count)
        seeds = seed + (rows * length + place) * draws
        here = _AfterPlace(model, states, cache, seeds, place)
        texts = truth if beside is None else torch.cat([truth[:, None], beside[:, place]], dim=1)
        samples = roll_out(here, texts, chunk=model.chunk, draws=draws, eos_id=model.eos_id)
        found.append((samples, truth, rows, torch.full((count,), place)))
    return Continuations(*(torch.stack(part, dim=1).flatten(0, 1) for part in zip(*found, strict=True)))


@dataclass(frozen=True)
class _AfterPlace:
    """Draws after the texts of a batch up to a place (``brier.DrawAfter``): number n of a text has the seed ``seeds`` +
    n. ``cache`` holds the texts; it is copied where draws go on after their own tokens."""

    model: LatentModel
    states: Tensor
    cache: StateCache
    seeds: Tensor
    place: int

    def __call__(self, contexts: Tensor, before: Tensor, numbers: Tensor) -> Tensor:
        model, chosen = self.model, contexts.to(self.model.device)
        states = self.states[chosen]
        if before.shape[1]:
            said = chunked(before, model.chunk).to(model.device)
            states = model.student.states(said, valid(said, model.eos_id), self.cache.copy(chosen))[:, -1]
        positions = torch.full_like(contexts, self.place + 1 + before.shape[1] // model.chunk)
        keys = Keys(self.seeds[contexts] + numbers, positions)
        return model.draw_after(states, keys, 0, 1, 1.0)[:, 0].cpu()
