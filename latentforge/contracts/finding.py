"""What a check hands back: did the claim hold, in one line and as data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """The result of one executable check.

    ``passed`` is True, False, or None where the check could not decide (UNKNOWN, with the reason in ``text``).
    ``text`` is one line that states what was measured, ``measured`` the same values as JSON-able data.
    """

    passed: bool | None
    text: str
    measured: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A check that returns numpy.bool_ or 1 would compare equal to True by accident; only the real thing counts.
        if self.passed is not None and type(self.passed) is not bool:
            raise TypeError(
                f"Finding.passed is {self.passed!r} ({type(self.passed).__name__}), not True, False or None"
            )
        if "\n" in self.text or "\r" in self.text:
            raise ValueError(f"Finding.text has more than one line: {self.text!r}")


def worse(one: float, other: float) -> float:
    """The larger of two errors; not a number, of which nothing is known, is worse than any, and stays."""
    return one if math.isnan(one) or one >= other else other
