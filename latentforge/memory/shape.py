"""The size of a decoder, counted in closed form from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from latentforge.errors import RefusedError

_COUNTED = ("qwen3", "qwen2", "llama", "mistral")
"""Model types whose parameters ``from_config`` counts exactly; a test holds the count against transformers."""

_NEEDED = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_LARGEST = 2**31


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
        """The shape that a Hugging Face ``config.json`` states.

        RefusedError for a type that is not counted here, for experts and quantised weights, and for a value that is no
        size: a wrong count could pass for "enough".
        """
        kind = config.get("model_type")
        if kind not in _COUNTED:
            raise RefusedError(f"model_type {kind!r} is not one whose memory is estimated ({', '.join(_COUNTED)})")
        missing = [name for name in _NEEDED if config.get(name) is None]
        if missing:
            raise RefusedError(f"config.json of a {kind} model lacks {', '.join(missing)}")
        if experts := next((name for name in _EXPERTS if config.get(name)), None):
            raise RefusedError(f"config.json names experts ({experts}), which are not counted")
        if config.get("quantization_config"):
            raise RefusedError("its weights are quantised: what they take once they are loaded is not counted")
        sizes = {name: _size(kind, config, name) for name in _NEEDED}
        hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        kv_heads = _size(kind, config, "num_key_value_heads", heads)
        head_dim = _size(kind, config, "head_dim", 128 if kind == "qwen3" else hidden // heads)
        if heads % kv_heads or not head_dim:
            raise RefusedError(
                f"config.json of a {kind} model: {heads} heads, {kv_heads} for keys, and a hidden size of {hidden} do "
                "not go together"
            )
        bias, mlp_bias, tied = (
            _flag(kind, config, name) for name in ("attention_bias", "mlp_bias", "tie_word_embeddings")
        )
        # transformers' defaults: Llama and Mistral do not tie unless told, neither do Qwen models without the key.
        return cls(
            vocab_size=sizes["vocab_size"],
            layers=sizes["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            intermediate=sizes["intermediate_size"],
            head_dim=head_dim,
            tied=tied,
            qk_norm=kind == "qwen3",
            qkv_bias=kind == "qwen2" or (bias and kind != "mistral"),
            output_bias=bias and kind in ("qwen3", "llama"),
            mlp_bias=mlp_bias and kind == "llama",
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


def _size(kind: str, config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
        raise RefusedError(f"config.json of a {kind} model: {name} = {str(value)[:40]!r} is no size")
    return value


def _flag(kind: str, config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise RefusedError(f"config.json of a {kind} model: {name} = {str(value)[:40]!r} is neither true nor false")
    return bool(value)
