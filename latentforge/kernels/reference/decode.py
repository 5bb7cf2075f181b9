"""What decoding means: written to be read, not to be fast. fp32, or fp64 where an argument is."""

from __future__ import annotations

import torch
from torch import Tensor

from latentforge.kernels.decode_settings import DecodeSettings
from latentforge.kernels.noise import gumbel
from latentforge.kernels.weights import Int8Weight

_CHUNK_ELEMENTS = 1 << 24  # of one chunk's logits, and of one converted block of the weight


def decode(
    hidden: Tensor,
    weight: Tensor | Int8Weight,
    settings: DecodeSettings,
    seeds: Tensor | None,
    positions: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The token of each row and its log-probability: ids int64 [N], logprobs [N] fp32 (fp64 where an argument is).

    ``hidden`` [N, H], ``weight`` [V, H], ``bias`` [V] or None, ``seeds`` and ``positions`` [N] int64 unless greedy.
    With z the logits and T the temperature (1 where greedy) the token is the lowest argmax over the allowed ids of
    z / T + g(seed, position, id), g = 0 where greedy; its log-probability is that of softmax(z / T) over the whole
    vocabulary. Allowed are the ``top_k`` largest z (of equals the lower id), and of these the fewest, most likely
    first, whose share of the mass reaches ``top_p``. Minus infinity is never chosen. A row in which z / T is NaN or
    plus infinity somewhere, or minus infinity everywhere, gives id -1 and NaN.
    """
    chunk = max(1, _CHUNK_ELEMENTS // max(settings.vocab, 1))
    ids, logprobs = [], []
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        z = logits(hidden[rows], weight, settings, bias)
        noise = None
        if not settings.greedy and seeds is not None and positions is not None:
            everyone = torch.arange(settings.vocab, device=hidden.device)
            noise = gumbel(seeds[rows, None], positions[rows, None], everyone[None, :])
        found = _choose(z, settings, noise)
        ids.append(found[0])
        logprobs.append(found[1])
    nothing = hidden.new_zeros(0, dtype=_dtype(hidden, weight, bias))
    return torch.cat([*ids, nothing.long()]), torch.cat([*logprobs, nothing])


def _dtype(hidden: Tensor, weight: Tensor | Int8Weight, bias: Tensor | None) -> torch.dtype:
    exact = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in (hidden, weight, bias))
    return torch.float64 if exact else torch.float32


def logits(hidden: Tensor, weight: Tensor | Int8Weight, settings: DecodeSettings, bias: Tensor | None = None) -> Tensor:
    """The logits [N, vocab] that are chosen from: product, bias, scale, soft cap."""
    dtype = _dtype(hidden, weight, bias)
    x = torch.empty(hidden.shape[0], settings.vocab, dtype=dtype, device=hidden.device)
    block = max(1, _CHUNK_ELEMENTS // max(hidden.shape[1], 1))
    for start in range(0, settings.vocab, block):
        columns = slice(start, min(start + block, settings.vocab))
        if isinstance(weight, Int8Weight):
            product = hidden.to(dtype) @ weight.values[columns].to(dtype).T
            x[:, columns] = product * weight.scales[columns].to(dtype)
        else:
            x[:, columns] = hidden.to(dtype) @ weight[columns].to(dtype).T
    if bias is not None:
        x = x + bias[: settings.vocab].to(dtype)
    if settings.logit_scale != 1.0:
        x = x * settings.logit_scale
    if settings.soft_cap is not None:
        x = torch.where(x == -torch.inf, x, settings.soft_cap * torch.tanh(x / settings.soft_cap))
    return x


def allowed(z: Tensor, settings: DecodeSettings) -> Tensor:
    """Which tokens [N, vocab] top-k and top-p leave, for rows without NaN."""
    keep = z > -torch.inf
    if settings.greedy or (settings.top_k is None and settings.top_p is None):
        return keep
    order = z.sort(dim=1, descending=True, stable=True).indices  # of equals the lower id comes first
    ranked = z.double().gather(1, order) / settings.temperature
    inside = torch.ones_like(keep)
    if settings.top_k is not None:
        inside[:, settings.top_k :] = False
    if settings.top_p is not None and settings.top_p < 1:
        mass = torch.softmax(ranked.masked_fill(~inside, -torch.inf), dim=1)
        before = mass.cumsum(dim=1) - mass
        inside &= before < settings.top_p  # the token that crosses is in
    return keep & torch.zeros_like(keep).scatter(1, order, inside)


def _choose(z: Tensor, settings: DecodeSettings, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    scaled = z if settings.greedy else z / settings.temperature
    impossible = torch.isnan(scaled).any(dim=1) | (scaled == torch.inf).any(dim=1) | (scaled == -torch.inf).all(dim=1)
    scaled = torch.where(impossible[:, None], 0.0, scaled)
    score = scaled if noise is None else scaled + noise
    score = score.masked_fill(~allowed(torch.where(impossible[:, None], 0.0, z), settings), -torch.inf)
    columns = torch.arange(z.shape[1], device=z.device).expand_as(z)
    best = score.amax(dim=1, keepdim=True)
    ids = torch.where(score == best, columns, z.shape[1]).amin(dim=1)  # of equals the lowest
    logprobs = torch.log_softmax(scaled, dim=1).gather(1, ids[:, None]).squeeze(1)
    return torch.where(impossible, -1, ids), torch.where(impossible, torch.nan, logprobs)
