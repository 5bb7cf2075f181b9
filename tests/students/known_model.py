"""A transformers model whose every probability is known: what it says depends on the last token alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def markov_model(rows: Tensor, *, eos_id: int = 0, positions: int = 128) -> Any:
    """A Qwen3 causal LM with the probabilities ``rows`` [V, V] of the token after each; V even.

    Its layer adds nothing, so a state is its token, one-hot; the last layer reads the logarithms off.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    size = len(rows)
    config = Qwen3Config(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=size,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        rms_norm_eps=1e-12,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=None,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(rows.clamp_min(1e-12).log().T / size**0.5)
    return model
