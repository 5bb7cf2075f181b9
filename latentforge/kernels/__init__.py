"""Kernels of distillation: losses with their gradients, and decoding, readable as definitions and fast as programs.

``kd_loss``, ``linear_kd_loss``, ``kd_divergence`` and ``latent_decode`` are the calls; ``targets`` holds what a teacher
says; ``reference`` is the definition. Importing this package imports torch only when one of its names is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentforge.kernels.api import KDCriterion, KDLoss, kd_divergence, kd_loss
    from latentforge.kernels.decode import Decoded, latent_decode
    from latentforge.kernels.linear import LinearKDCriterion, linear_kd_loss
    from latentforge.kernels.targets import DenseTargets, LinearTargets, Targets, TopKTargets
    from latentforge.kernels.weights import Int8Weight, quantize_int8

__all__ = [
    "Decoded",
    "DenseTargets",
    "Int8Weight",
    "KDCriterion",
    "KDLoss",
    "LinearKDCriterion",
    "LinearTargets",
    "Targets",
    "TopKTargets",
    "kd_divergence",
    "kd_loss",
    "latent_decode",
    "linear_kd_loss",
    "quantize_int8",
]

_HOMES = {
    "Decoded": "decode",
    "DenseTargets": "targets",
    "Int8Weight": "weights",
    "KDCriterion": "api",
    "KDLoss": "api",
    "LinearKDCriterion": "linear",
    "LinearTargets": "targets",
    "Targets": "targets",
    "TopKTargets": "targets",
    "kd_divergence": "api",
    "kd_loss": "api",
    "latent_decode": "decode",
    "linear_kd_loss": "linear",
    "quantize_int8": "weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
