"""A position more of a text: a Qwen3 decoder over a cache, without the calls that transformers makes around each layer.

With one position a step is a few dozen small operations a layer, and what transformers does between them (masks, copies
of the whole cache, several calls for a norm) takes as long as they do. The weights, and what is computed, are the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3Model
from transformers.cache_utils import Cache, DynamicLayer

_ROOM = 16
"""The fewest places that are set aside at a time for keys and values to come."""


class GrowingLayer(DynamicLayer):
    """A layer's keys and values [B, H, n, head] with room behind them: a new position copies none of those before it.

    ``keys`` and ``values`` may be set to others at any time; room is made for these at the next position.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """See transformers: nothing is held yet."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values [B, H, m, head] of m positions; all that are held, as they are from now on."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled():  # a gradient needs what was there as it was
            return super().update(key_states, value_states)
        self.keys = self._extended("keys", key_states)
        self.values = self._extended("values", value_states)
        return self.keys, self.values

    def _extended(self, name: str, added: Tensor) -> Tensor:
        held: Tensor = getattr(self, name)
        room: dict[str, tuple[Tensor, Tensor]] = self.__dict__.setdefault("_room", {})
        before, length = held.shape[2], held.shape[2] + added.shape[2]
        mine = room.get(name)
        if mine is None or mine[1] is not held or mine[0].shape[2] < length:
            batch, heads, _, size = held.shape
            whole = held.new_empty(batch, heads, length + max(_ROOM, length // 2), size)
            whole[:, :, :before] = held
        else:
            whole = mine[0]
        whole[:, :, before:length] = added
        found = whole[:, :, :length]
        room[name] = (whole, found)
        return found


def growing_cache(layers: list[tuple[Tensor, Tensor]] | None = None) -> Cache:
    """A transformers cache of such layers, of the (keys, values) of each, or empty."""
    if layers is None:
        return Cache(layer_class_to_replicate=GrowingLayer)
    held = [GrowingLayer() for _ in layers]
    for layer, (keys, values) in zip(held, layers, strict=True):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return Cache(layers=held)


def can_step(model: Any) -> bool:
    """Whether ``step`` knows the arithmetic of ``model``."""
    config = getattr(model, "config", None)
    return (
        type(model) is Qwen3Model
        and config.hidden_act == "silu"
        and set(config.layer_types) == {"full_attention"}
        and model.rotary_emb.rope_type == "default"
    )


@torch.no_grad()
def step(
    model: Any, vectors: Tensor, cache: Cache, mask: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """States [B, 1, d], after the last norm, of one new position ``vectors`` [B, 1, d] of a ``Qwen3Model``.

    ``cache`` (see ``growing_cache``) holds the positions before it, and is extended. ``mask`` bool [B, past + 1] is
    false where nothing is to be seen; ``positions`` int64 [B, 1], None for as many as there were before. The states are
    those of the model's own forward pass but for the order of additions.
    """
    x = vectors[:, 0]
    first = model.layers[0].self_attn
    if positions is None:
        positions = torch.full((1, 1), cache.get_seq_length(), device=x.device)
    angles = positions.float() * model.rotary_emb.inv_freq  # [B, head / 2]
    sine = angles.sin()
    cosine, sine = angles.cos().repeat(1, 2), torch.cat([-sine, sine], dim=-1)
    turn = cosine.unsqueeze(1).to(x.dtype), sine.unsqueeze(1).to(x.dtype)
    seen = None if mask is None else mask[:, None, None]
    wide, narrow = (_Root(size, model.norm.variance_epsilon, x.device) for size in (x.shape[-1], first.head_dim))
    for number, layer in enumerate(model.layers):
        x = x + _attended(layer.self_attn, wide(x, layer.input_layernorm.weight), cache, number, turn, seen, narrow)
        h = wide(x, layer.post_attention_layernorm.weight)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
    return wide(x, model.norm.weight).unsqueeze(1)


class _Root:
    """Root mean square norms over ``size`` numbers. Constants are tensors: a number in Python costs two operations."""

    def __init__(self, size: int, epsilon: float, device: torch.device) -> None:
        self.root = torch.full((), math.sqrt(size), device=device)
        self.floor = torch.full((), math.sqrt(size * epsilon), device=device)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        length = torch.hypot(torch.linalg.vector_norm(wide, dim=-1, keepdim=True), self.floor)
        return (wide * (self.root / length)).to(x.dtype) * weight


def _attended(
    attention: Any,
    x: Tensor,
    cache: Cache,
    number: int,
    turn: tuple[Tensor, Tensor],
    seen: Tensor | None,
    norm: _Root,
) -> Tensor:
    """What layer ``number`` adds to [B, d]. The query heads that share a key head are the queries of one attention."""
    rows, size = len(x), attention.head_dim
    q = norm(attention.q_proj(x).view(rows, -1, size), attention.q_norm.weight)
    k = norm(attention.k_proj(x).view(rows, -1, size), attention.k_norm.weight)
    heads = k.shape[1]
    both = torch.cat([q, k], dim=1)
    both = both * turn[0] + both.roll(size // 2, dims=-1) * turn[1]
    q, k = both[:, :-heads], both[:, -heads:]
    keys, values = cache.update(k.unsqueeze(2), attention.v_proj(x).view(rows, heads, 1, size), number)
    found = F.scaled_dot_product_attention(
        q.unflatten(1, (heads, -1)), keys, values, attn_mask=seen, scale=attention.scaling
    )
    return attention.o_proj(found.flatten(1))
