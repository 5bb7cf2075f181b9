"""Which of several fallback hosts a plan is for, and why those before it were passed over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LaneChoice:
    """The lanes that were asked, the one that was chosen with the reason, and the reason against each other one."""

    asked: tuple[str, ...]
    chosen: str
    because: str
    passed_over: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """The choice as a plan shows it."""
        others = "".join(f"; {host}: {why}" for host, why in self.passed_over)
        return f"{self.chosen} of {', '.join(self.asked)}: {self.because}{others}"

    def as_json(self) -> dict[str, Any]:
        """The choice for programs and for the manifest."""
        over = dict(self.passed_over)
        return {"asked": list(self.asked), "chosen": self.chosen, "because": self.because, "passed_over": over}
