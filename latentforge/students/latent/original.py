"""The losses of the first LatentForge, of one drawn vector and K independent positions: here to be compared with.

None of them is a proper rule for a chunk. The squared error is least at the mean of all that may follow, the
cross-entropy and the KL at each position's own distribution: tokens of different continuations are mixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from latentforge.kernels.linear import linear_kd_loss
from latentforge.kernels.targets import LinearTargets, Targets
from latentforge.students.latent.codec import Codec


@dataclass(frozen=True)
class VectorSignal:
    """What a drawn latent is held to, a draw a chunk.

    ``mean`` [B, C-1, l] is the codec's own latent of the next chunk, used where ``given`` bool [B, C-1]; ``targets`` a
    teacher's rows as in ``TokenSignal``. ``chunk_denominator`` counts the given chunks of the whole optimiser step,
    ``token_denominator`` the tokens.
    """

    codec: Codec
    mean: Tensor
    given: Tensor
    targets: Targets | LinearTargets | None
    chunk_denominator: float
    token_denominator: float
    mse_weight: float
    ce_weight: float
    kl_weight: float
    temperature: float = 1.0


class VectorLoss(NamedTuple):
    """``loss`` is weighted and differentiable; its parts are neither: ``mse`` a number of the latent, ``ce`` and ``kl``
    nats a token over the denominators (NaN where nothing was asked)."""

    loss: Tensor
    mse: Tensor
    ce: Tensor
    kl: Tensor


def vector_loss(
    signal: VectorSignal, drawn: Tensor, labels: Tensor, *, ignore_index: int, backend: str = "auto"
) -> VectorLoss:
    """The loss of ``drawn`` latents fp32 [B, C-1, l] under ``labels`` int64 [B * (C*K - 1)]; the codec is not trained.

    No logits of all rows are made.
    """
    error = (drawn - signal.mean)[signal.given].square().mean(-1).sum() / signal.chunk_denominator
    loss = signal.mse_weight * error
    ce = kl = torch.full((), torch.nan, device=drawn.device)
    if signal.ce_weight > 0 or signal.kl_weight > 0:
        codec, (rows, chunks) = signal.codec, drawn.shape[:2]
        size = codec.shape.chunk
        hidden = codec.hidden(drawn.flatten(0, 1)).reshape(rows, chunks * size, -1)
        # Those of the first chunk, which nothing is drawn for, are left out by their labels.
        before = torch.zeros(rows, size - 1, hidden.shape[-1], device=hidden.device, dtype=hidden.dtype)
        found = linear_kd_loss(
            torch.cat([before, hidden], dim=1).flatten(0, 1),
            codec.output_weight,
            signal.targets if signal.kl_weight > 0 else None,
            labels,
            temperature=signal.temperature,
            ce_weight=signal.ce_weight,
            kd_weight=signal.kl_weight,
            denominator=signal.token_denominator,
            ignore_index=ignore_index,
            backend=backend,
        )
        loss, ce, kl = loss + found.loss, found.ce, found.kd
    return VectorLoss(loss, error.detach(), ce, kl)
