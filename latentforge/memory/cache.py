"""What a serving teacher keeps a token and a sequence: keys and values, and the states of linear attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from latentforge.errors import RefusedError

_STATE_WIDTH = 4
"""Recurrent states are kept in fp32."""
_HYBRID = ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")


@dataclass(frozen=True)
class CacheShape:
    """Sizes of the caches: ``layers`` that attend over all tokens, and the fp32 numbers of all recurrent states of one
    sequence (gated delta networks, as in Qwen3-Next; 0 where there are none)."""

    layers: int
    kv_heads: int
    head_dim: int
    state_numbers: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The sizes that a ``config.json`` states, experts or not; RefusedError where it does not state them."""
        config = config.get("text_config") or config
        layers = _size(config, "num_hidden_layers")
        heads = _size(config, "num_attention_heads")
        kv_heads = _size(config, "num_key_value_heads", heads)
        head_dim = _size(config, "head_dim", _size(config, "hidden_size") // heads)
        full = _attending(config, layers)
        states = 0
        if full < layers:
            missing = [name for name in _HYBRID if not config.get(name)]
            if missing:
                raise RefusedError(f"{layers - full} of {layers} layers do not attend; config.json lacks {missing[0]}")
            values, key_dim, value_dim = (_size(config, name) for name in _HYBRID)
            states = (layers - full) * values * key_dim * value_dim
        return cls(full, kv_heads, head_dim, states)

    def kv_bytes(self, tokens: int, width: int = 2) -> int:
        """Bytes of keys and values for ``tokens`` tokens, ``width`` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width * tokens

    def state_bytes(self, sequences: int) -> int:
        """Bytes of the recurrent states of ``sequences`` sequences, whatever their length."""
        return _STATE_WIDTH * self.state_numbers * sequences


def _attending(config: Mapping[str, Any], layers: int) -> int:
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        # A sliding window keeps less than all tokens; counting it as full never counts too little.
        return sum(1 for kind in kinds if "linear" not in str(kind))
    every = config.get("full_attention_interval")
    return layers // every if isinstance(every, int) and every > 0 else layers


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RefusedError(f"config.json: {name} = {str(value)[:40]!r} is no size, so its caches are not counted")
    return value
