"""What the kernels of the KD loss compute, apart from tensors: one frozen object that every backend takes."""

from __future__ import annotations

from dataclasses import dataclass

from latentforge.errors import RefusedError
from latentforge.kernels.arguments import (
    check_name,
    check_number,
    check_positive,
    check_temperature,
    check_whole,
    shown,
)

DIRECTIONS = ("forward", "reverse", "jsd")


@dataclass(frozen=True)
class KDSettings:
    """Settings of ``row_losses``; ``ce_scale`` and ``kd_scale`` are the factors of the gradient.

    ``ce_scale`` = ce_weight / denominator, ``kd_scale`` = kd_weight * T^2 / denominator. ``direction`` is ``forward``
    KL(p || q), ``reverse`` KL(q || p) or ``jsd``, beta KL(p || m) + (1 - beta) KL(q || m) with
    m = beta p + (1 - beta) q and 0 < beta < 1. The student's logits are shaped first:
    ``cap * tanh(scale * (x + bias) / cap)``, where ``soft_cap`` None means no cap; the gradient is that over x. The
    bias is a tensor and is passed beside the settings.
    """

    temperature: float
    teacher_temperature: float
    ce_scale: float = 0.0
    kd_scale: float = 0.0
    direction: str = "forward"
    beta: float = 0.5
    logit_scale: float = 1.0
    soft_cap: float | None = None
    ignore_index: int = -100

    def __post_init__(self) -> None:
        check_temperature("temperature", self.temperature)
        check_temperature("teacher_temperature", self.teacher_temperature)
        check_positive("logit_scale", self.logit_scale)
        if self.soft_cap is not None:
            check_positive("soft_cap", self.soft_cap, next="pass None for no cap")
        check_whole("ignore_index", self.ignore_index, "a whole number of 64 bits")
        check_name("direction", self.direction, DIRECTIONS)
        check_number("beta", self.beta, 0, 1, "between 0 and 1")
        if self.direction == "jsd" and not 0 < self.beta < 1:
            raise RefusedError(
                f"beta = {shown(self.beta)} is not between 0 and 1",
                next="use direction='forward' for beta 0 and direction='reverse' for beta 1",
            )

    @property
    def shaped(self) -> bool:
        """Whether scale or cap change the logits (a bias does so too)."""
        return self.logit_scale != 1.0 or self.soft_cap is not None
