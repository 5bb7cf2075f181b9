"""The size of a decoder, counted in closed form from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from latentforge.errors import RefusedError

_COUNTED = ("qwen3", "qwen2", "llama", "mistral")
"""Model types whose parameters ``from_config`` counts exactly; a test holds the count against transformers."""

_NEEDED = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True)
class ModelShape:
    """A causal decoder with grouped-query attention and a gated MLP.

    ``head_dim`` is the width of one head; ``tied`` says that the output head is the embedding; ``qk_norm`` that queries
    and keys are normalised per head (Qwen3); ``qkv_bias`` that their projections have a bias (Qwen2); ``biases`` that
    attention output and MLP have one too.
    """

    vocab_size: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int
    tied: bool = True
    qk_norm: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def qwen3(
        cls,
        vocab_size: int,
        *,
        layers: int,
        hidden: int,
        heads: int,
        kv_heads: int,
        intermediate: int,
        tied: bool = True,
    ) -> Self:
        """The shape of a Qwen3 model whose heads divide the hidden size, as the pipeline's own models are."""
        return cls(vocab_size, layers, hidden, heads, kv_heads, intermediate, hidden // heads, tied)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The shape that a Hugging Face ``config.json`` states; RefusedError for a type that is not counted here."""
        kind = config.get("model_type")
        if kind not in _COUNTED:
            raise RefusedError(f"model_type {kind!r} is not one whose memory is estimated ({', '.join(_COUNTED)})")
        missing = [name for name in _NEEDED if not isinstance(config.get(name), int)]
        if missing:
            raise RefusedError(f"config.json of a {kind} model lacks {', '.join(missing)}")
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        bias = bool(config.get("attention_bias", False))
        # transformers' defaults: Llama and Mistral do not tie unless told, neither do Qwen models without the key.
        return cls(
            vocab_size=config["vocab_size"],
            layers=config["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            intermediate=config["intermediate_size"],
            head_dim=config.get("head_dim") or (128 if kind == "qwen3" else hidden // heads),
            tied=bool(config.get("tie_word_embeddings", False)),
            qk_norm=kind == "qwen3",
            qkv_bias=kind == "qwen2" or (bias and kind != "mistral"),
            output_bias=bias and kind in ("qwen3", "llama"),
            mlp_bias=bool(config.get("mlp_bias", False)) and kind == "llama",
        )

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together (and of all value heads)."""
        return self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        hidden, query, kv, inner = self.hidden, self.query_width, self.kv_width, self.intermediate
        attention = hidden * query + 2 * hidden * kv + query * hidden
        attention += (query + 2 * kv if self.qkv_bias else 0) + (hidden if self.output_bias else 0)
        attention += 2 * self.head_dim if self.qk_norm else 0
        mlp = 3 * hidden * inner + (2 * inner + hidden if self.mlp_bias else 0)
        return attention + mlp + 2 * hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; a tied head counts once."""
        embeddings = self.vocab_size * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * self.layer_parameters + self.hidden
