"""What decoding computes, apart from tensors: one frozen object that every backend takes."""

from __future__ import annotations

from dataclasses import dataclass

from latentforge.errors import RefusedError
from latentforge.kernels.arguments import (
    HIGHEST_TEMPERATURE,
    LARGEST,
    LOWEST_TEMPERATURE,
    check_number,
    check_positive,
    check_whole,
    shown,
)


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
        check_whole("vocab", self.vocab, "a whole number from 1 on", low=1)
        check_positive("logit_scale", self.logit_scale)
        if self.soft_cap is not None:
            check_positive("soft_cap", self.soft_cap, next="pass None for no cap")
        said = f"0 or a number from {LOWEST_TEMPERATURE} to {HIGHEST_TEMPERATURE:g}"
        check_number("temperature", self.temperature, -LARGEST, LARGEST, said, next="pass 0 for greedy decoding")
        if self.temperature != 0 and not LOWEST_TEMPERATURE <= self.temperature <= HIGHEST_TEMPERATURE:
            raise RefusedError(
                f"temperature = {shown(self.temperature)} is not {said}", next="pass 0 for greedy decoding"
            )
        if self.top_k is not None:
            check_whole("top_k", self.top_k, "a whole number from 1 on", low=1, next="pass None for no limit")
        if self.top_p is not None:
            check_number("top_p", self.top_p, 1e-30, 1, "in (0, 1]", next="pass None for no limit")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn; top-k and top-p then change nothing."""
        return self.temperature == 0

    @property
    def shaped(self) -> bool:
        """Whether scale or cap change the logits (a bias does so too)."""
        return self.logit_scale != 1.0 or self.soft_cap is not None
