"""A token-level model against held-out text: what it says after each chunk, to be scored beside a latent one.

The contexts, the four tokens and their order are those of ``latent.evaluate.continuations``. A row is read as it
stands, as in training: the places behind an EOS hold EOS again, and are counted nowhere.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.decode import latent_decode
from latentforge.students.causal import Student
from latentforge.students.latent.brier import ORDERS
from latentforge.students.latent.chunks import absorbed
from latentforge.students.likelihood import output_layer, row_logprobs

_NUMBERS = 1 << 24  # probabilities that are made at once


class TokenContinuations(NamedTuple):
    """M contexts, row by row: ``samples`` int64 [M, N, 4] drawn after each, ``truth`` int64 [M, 4] of the text,
    ``truth_logprobs`` fp32 [M, 4] of its tokens and ``collisions`` fp32 [M, N, 4], the sum of p^2 where each
    token was drawn; ``rows`` and ``places`` int64 [M] say which, after chunk ``places`` of that row. On the CPU.

    Scores: ``brier_lm(token_scores(found.truth_logprobs, found.samples, found.collisions), groups=found.rows)``.
    """

    samples: Tensor
    truth: Tensor
    truth_logprobs: Tensor
    collisions: Tensor
    rows: Tensor
    places: Tensor


@torch.no_grad()
def token_continuations(
    student: Student,
    chunks: Tensor,
    *,
    eos_id: int,
    draws: int,
    seed: int = 0,
    most_rows: int = 4096,
    kernel_backend: str = "auto",
) -> TokenContinuations:
    """``draws`` (N) continuations of four tokens after each chunk of rows ``chunks`` int64 [B, C, K], at temperature 1.

    A context is a chunk after which the row holds four more places; what follows the end of the text there is EOS
    again, and certain. ``seed`` and a context's row and place key its draws. At most ``most_rows`` texts are computed
    at once.
    """
    if chunks.ndim != 3:
        raise RefusedError(f"chunks are {list(chunks.shape)}, not [B, C, K]")
    ahead = -(-ORDERS // chunks.shape[2])
    if chunks.shape[1] <= ahead:
        raise RefusedError(
            f"rows of {chunks.shape[1]} chunks of {chunks.shape[2]}: no chunk has {ORDERS} tokens after it"
        )
    size = max(1, most_rows // draws)
    parts = [
        _of_rows(student, chunks[start : start + size], start, ahead, eos_id, draws, seed, kernel_backend)
        for start in range(0, len(chunks), size)
    ]
    return TokenContinuations(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _of_rows(
    student: Student, chunks: Tensor, start: int, ahead: int, eos_id: int, draws: int, seed: int, backend: str
) -> TokenContinuations:
    """The contexts of a block of rows, the first of which is number ``start``: place after place, with a cache."""
    count, length, size = chunks.shape
    device = student.model.get_output_embeddings().weight.device
    known = row_logprobs(student, chunks.flatten(1).to(device)).cpu()
    numbers, cache, found = torch.arange(start, start + count), None, []
    for place in range(length - ahead):
        read = student.model.base_model(input_ids=chunks[:, place].to(device), past_key_values=cache, use_cache=True)
        cache = read.past_key_values
        after = (place + 1) * size
        truth = absorbed(chunks.flatten(1)[:, after : after + ORDERS], eos_id)
        logprobs = known[:, after - 1 : after - 1 + ORDERS].masked_fill(_ended(truth, eos_id), 0.0)
        seeds = (seed + (numbers * length + place) * draws)[:, None] + torch.arange(draws)
        samples, sums = _draws(student, read.last_hidden_state[:, -1], cache, seeds, after, eos_id, backend)
        found.append((samples, truth, logprobs, sums, numbers, torch.full((count,), place)))
    return TokenContinuations(*(torch.stack(part, dim=1).flatten(0, 1) for part in zip(*found, strict=True)))


def _ended(tokens: Tensor, eos_id: int) -> Tensor:
    """bool [..., n]: whether the text was over before this token."""
    over = (tokens == eos_id).cumsum(-1) > 0
    return torch.cat([torch.zeros_like(over[..., :1]), over[..., :-1]], dim=-1)


def _draws(
    student: Student, states: Tensor, cache: Any, seeds: Tensor, position: int, eos_id: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Samples int64 and collisions fp32 [B, N, 4] after texts with last ``states`` [B, H], the first of their tokens at
    place ``position``; ``seeds`` int64 [B, N]. ``cache`` holds the texts and is not changed."""
    shape = (*seeds.shape, ORDERS)
    states = states.repeat_interleave(seeds.shape[1], 0)
    keys = seeds.flatten().to(states.device)
    own = copy.deepcopy(cache)
    own.batch_repeat_interleave(seeds.shape[1])
    samples = torch.empty(len(states), ORDERS, dtype=torch.int64, device=states.device)
    sums = torch.ones(len(states), ORDERS, device=states.device)
    over = torch.zeros(len(states), dtype=torch.bool, device=states.device)
    for step in range(ORDERS):
        if step:
            read = student.model.base_model(input_ids=samples[:, step - 1, None], past_key_values=own, use_cache=True)
            states = read.last_hidden_state[:, -1]
        ids, collisions = _said(student, states, keys, position + step, backend)
        samples[:, step] = ids.masked_fill(over, eos_id)
        sums[:, step] = collisions.masked_fill(over, 1.0)
        over |= samples[:, step] == eos_id
    return samples.reshape(shape).cpu(), sums.reshape(shape).cpu()


def _said(student: Student, states: Tensor, seeds: Tensor, position: int, backend: str) -> tuple[Tensor, Tensor]:
    """A token int64 [n] drawn after each of ``states`` [n, H], and sum p^2 fp32 [n] of what it was drawn from."""
    weight, bias = output_layer(student)
    size = max(1, _NUMBERS // len(weight))
    sums = [student.head(some).float().softmax(-1).square().sum(-1) for some in states.split(size)]
    positions = torch.full_like(seeds, position)
    found = latent_decode(
        states.contiguous(), weight, temperature=1.0, seeds=seeds, positions=positions, bias=bias, backend=backend
    )
    return found.ids, torch.cat(sums)
