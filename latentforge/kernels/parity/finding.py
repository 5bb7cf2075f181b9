"""What one comparison found, and how far apart two tensors are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parity:
    """One comparison's result; ``gradient_ratio`` is the error over what is allowed.

    ``case`` says what was compared, ``disagreements`` counts entries that are NaN or infinite on one side only.
    For ``latent_decode``, which has no gradient, the first three are about the log-probabilities. ``gain``, where it is
    asked for, is how many times nearer to fp64 than torch the gradient is, and ``gain_floor`` what is promised of it.
    """

    case: str
    gradient_error: float
    torch_error: float
    gradient_ratio: float
    loss_error: float = 0.0
    torch_loss_error: float = 0.0
    loss_floor: float = 0.0
    disagreements: int = 0
    gain: float | None = None
    gain_floor: float = 0.0

    @property
    def loss_excess(self) -> float:
        """How much further the loss is from fp64 than torch's."""
        return self.loss_error - self.torch_loss_error

    @property
    def passed(self) -> bool:
        """Whether everything is within what is allowed; comparisons with NaN are false."""
        within = self.loss_error <= max(self.torch_loss_error, self.loss_floor)
        gained = self.gain is None or self.gain >= self.gain_floor
        return self.gradient_ratio <= 1.0 and within and self.disagreements == 0 and gained


def distance(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact| over the entries that are finite in both; where exact is zero there, |found|."""
    both = found.isfinite() & exact.isfinite()
    gap = float((found.double() - exact.double())[both].norm())
    size = float(exact.double()[both].norm())
    return gap / size if size > 0 else gap


def disagreements(found: Tensor, exact: Tensor) -> int:
    """How many entries are NaN, plus or minus infinity on one side and not on the other."""
    found, exact = found.cpu(), exact.cpu()
    wrong = found.isnan() != exact.isnan()
    for value in (torch.inf, -torch.inf):
        wrong |= (found == value) != (exact == value)
    return int(wrong.sum())
