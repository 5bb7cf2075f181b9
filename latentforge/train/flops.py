"""Floating-point operations of a phase, from the shapes: 2 a weight and token forward, 4 more backward."""

from __future__ import annotations

from typing import Any


def forward_flops_per_token(model: Any, positions: int) -> float:
    """Forward operations a token at ``positions`` tokens a sequence.

    2 · (weights in matrix products, the output layer included, the embedding's look-up not) + 4 · layers ·
    positions · attention width for scores and mixing (Kaplan et al. 2020, arXiv:2001.08361, section 2.1; the causal
    half is not taken off, since the dense kernel computes it).
    """
    config = model.config
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    if head is not embedding:
        matrices -= embedding.numel()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return float(2.0 * matrices + 4.0 * config.num_hidden_layers * positions * width)


def training_flops(model: Any, positions: int, tokens: int) -> float:
    """Operations to train on ``tokens`` tokens: forward, and twice that backward."""
    return 3.0 * forward_flops_per_token(model, positions) * tokens


def forward_flops(model: Any, positions: int, tokens: int) -> float:
    """Operations to read ``tokens`` tokens without training on them."""
    return forward_flops_per_token(model, positions) * tokens
