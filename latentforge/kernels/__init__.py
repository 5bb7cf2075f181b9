"""Distillation kernels: one loss with its gradient, in a readable definition and in fast implementations.

``kd_loss`` and ``kd_divergence`` are the calls; ``targets`` holds what a teacher says; ``reference`` is the definition.
Importing this package imports torch only when one of its names is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentforge.kernels.api import KDCriterion, KDLoss, kd_divergence, kd_loss
    from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets

__all__ = ["DenseTargets", "KDCriterion", "KDLoss", "Targets", "TopKTargets", "kd_divergence", "kd_loss"]

_HOMES = {
    "DenseTargets": "targets",
    "KDCriterion": "api",
    "KDLoss": "api",
    "Targets": "targets",
    "TopKTargets": "targets",
    "kd_divergence": "api",
    "kd_loss": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
