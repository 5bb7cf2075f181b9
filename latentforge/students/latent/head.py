"""The energy head: a latent of the next chunk from a state and noise, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentforge.errors import RefusedError


class HeadBlock(nn.Module):
    """x + Linear(SiLU(g) * v), where g and v come of x and the context c: [.., d] each, about 6 d^2 parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Sequential(
            nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * width)
        )
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        gate, value = self.mix(torch.cat([self.norm(x), context], dim=-1)).chunk(2, dim=-1)
        found: Tensor = x + self.out(nn.functional.silu(gate) * value)
        return found


class EnergyHead(nn.Module):
    """Draws of the next chunk's latent (CALM, arXiv 2510.27688, section 3.2).

    The last layer starts at zero. With ``tempered`` the head is told the temperature of the text that it is to draw,
    as log T: at T = 1 it is the same head as without.
    """

    def __init__(self, *, width: int, latent: int, noise: int, blocks: int, tempered: bool) -> None:
        super().__init__()
        self.noise_size = noise
        self.from_noise, self.noise_norm = nn.Linear(noise, width), nn.LayerNorm(width)
        self.from_state, self.state_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.from_temperature = nn.Linear(1, width, bias=False) if tempered else None
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(blocks))
        self.out_norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)
        self.to_latent = nn.Linear(width, latent)
        self.checkpointing = False
        nn.init.zeros_(self.to_latent.weight)
        nn.init.zeros_(self.to_latent.bias)

    def forward(self, states: Tensor, noise: Tensor, temperature: Tensor | None = None) -> Tensor:
        """Latents fp32 [N, S, l] of ``states`` [N, d] with ``noise`` [N, S, u] on [-1/2, 1/2]; ``temperature`` [N] in
        (0, 1], or None for 1. One pass is one draw; draws of the same noise are the same.
        """
        if noise.dim() != 3 or noise.shape[::2] != (len(states), self.noise_size):
            raise RefusedError(f"noise is {list(noise.shape)}, not [{len(states)}, S, {self.noise_size}]")
        dtype = self.to_latent.weight.dtype
        x = self.noise_norm(self.from_noise(noise.to(dtype)))
        context = self.from_state(states)
        if temperature is not None:
            context = context + self._temperature(temperature).to(dtype)
        context = self.state_norm(context).unsqueeze(1).expand(-1, x.shape[1], -1)
        for block in self.blocks:
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = _recomputed(block, x, context)
            else:
                x = block(x, context)
        found: Tensor = self.to_latent(nn.functional.silu(self.out(self.out_norm(x))))
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def _temperature(self, temperature: Tensor) -> Tensor:
        if self.from_temperature is None:
            raise RefusedError(
                "this head was not trained on tempered text: it draws at temperature 1 alone",
                next="draw by rejection or by voting, or train with tempered samples",
            )
        if bool(((temperature <= 0) | (temperature > 1) | ~temperature.isfinite()).any()):
            raise RefusedError(f"temperatures {temperature.tolist()[:4]} are not in (0, 1]")
        weight = self.from_temperature.weight
        found: Tensor = self.from_temperature(temperature.float().log().unsqueeze(-1).to(weight.dtype))
        return found


def _recomputed(block: nn.Module, *arguments: Any) -> Tensor:
    found: Tensor = checkpoint(block, *arguments, use_reentrant=False)
    return found
