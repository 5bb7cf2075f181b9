"""Chunks as targets of the energy head: the codec's posteriors of the text, or of what a teacher went on with."""

from __future__ import annotations

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.students.latent.codec import Codec
from latentforge.students.latent.student import EnergySignal, predicted


def text_signal(
    codec: Codec, chunks: Tensor, valid: Tensor, *, denominator: float, weight: float = 1.0
) -> EnergySignal:
    """The signal of the text itself: each chunk of int64 [B, C, K] but a row's first, where ``valid`` bool of that
    shape holds a token. ``denominator`` counts those of the whole optimiser step (``student.predicted``).
    """
    return continuation_signal(
        codec,
        chunks[:, 1:].unsqueeze(2),
        valid[:, 1:].unsqueeze(2),
        given=predicted(valid),
        denominator=denominator,
        weight=weight,
    )


@torch.no_grad()
def continuation_signal(
    codec: Codec,
    continuations: Tensor,
    valid: Tensor,
    *,
    given: Tensor,
    denominator: float,
    weight: float = 1.0,
    temperature: Tensor | None = None,
) -> EnergySignal:
    """The signal of R chunks int64 [B, C-1, R, K] drawn for each row: how a teacher continues the chunks up to i.

    ``valid`` bool of that shape is false for padding. ``given`` bool [B, C-1] says for which rows there are chunks; all
    of theirs hold a token, and what stands in the others is not read. ``temperature`` [B, C-1] is that at which they
    were drawn, None for 1. The codec is used as it is: nothing of it is trained.
    """
    if continuations.dim() != 4 or valid.shape != continuations.shape or given.shape != continuations.shape[:2]:
        raise RefusedError(
            f"continuations {list(continuations.shape)}, valid {list(valid.shape)} and given {list(given.shape)} are "
            "not [B, C-1, R, K] twice and [B, C-1]"
        )
    empty = int((~valid[given].any(-1)).sum())
    if empty:
        raise RefusedError(f"{empty} of the given continuations hold no token", next="leave their rows out of given")
    found = codec.encode(continuations[given].flatten(0, 1), valid[given].flatten(0, 1))
    shape = (*continuations.shape[:3], codec.shape.latent)
    mean, log_std = (torch.zeros(shape, device=continuations.device) for _ in range(2))
    mean[given] = found.mean.unflatten(0, (-1, shape[2]))
    log_std[given] = found.log_std.unflatten(0, (-1, shape[2]))
    return EnergySignal(mean, log_std, given, denominator, weight, temperature)
