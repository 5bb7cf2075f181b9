"""What decoding computes, apart from tensors: one frozen object that every backend takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from latentforge.errors import RefusedError

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-4, 1e4


@dataclass(frozen=True)
class DecodeSettings:
    """Settings of a backend's ``decode``.

    ``vocab`` is the number of columns that count; those beyond are padding. ``temperature`` 0 is greedy. ``top_k`` and
    ``top_p`` None take every token. The logits are ``cap * tanh(scale * (x + bias) / cap)``, where ``soft_cap`` None
    means no cap. RefusedError names a value out of range.
    """

    vocab: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        for name in ("logit_scale", "soft_cap"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise RefusedError(f"{name} = {value} is not a positive number")
        t = self.temperature
        if t != 0 and not LOWEST_TEMPERATURE <= t <= HIGHEST_TEMPERATURE:
            raise RefusedError(
                f"temperature = {t} is neither 0 nor between {LOWEST_TEMPERATURE} and {HIGHEST_TEMPERATURE}",
                next="pass 0 for greedy decoding",
            )
        if self.top_k is not None and (isinstance(self.top_k, bool) or self.top_k != int(self.top_k) or self.top_k < 1):
            raise RefusedError(f"top_k = {self.top_k} is not a whole number from 1 on", next="pass None for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RefusedError(f"top_p = {self.top_p} is not in (0, 1]", next="pass None for no limit")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn; top-k and top-p then change nothing."""
        return self.temperature == 0

    @property
    def shaped(self) -> bool:
        """Whether scale or cap change the logits (a bias does so too)."""
        return self.logit_scale != 1.0 or self.soft_cap is not None
