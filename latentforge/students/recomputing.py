"""Activations inside a transformers model's layers, computed again for the gradient instead of being kept for it."""

from __future__ import annotations

from typing import Any

from torch import nn

from latentforge.errors import RefusedError


def recompute_layers(model: Any) -> None:
    """From now on ``model``'s layers keep their inputs alone while training, and compute what lies between once more
    for the gradient, with the same bits. RefusedError for a model whose layers cannot.
    """
    # The name since transformers 5.20-odd, and the one before it, which warns there.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name) if hasattr(model, name) else model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise RefusedError(
            f"activation_checkpointing = true: {error}", next="leave it out, or start from another architecture"
        ) from None


def layers_recomputed(model: nn.Module) -> bool:
    """Whether every layer of a transformers model that can be computed again is, as the layers themselves hold it."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    return bool(layers) and all(one.gradient_checkpointing for one in layers)
