"""What a model's training came to over all its steps: rows with targets, text of its own, time its teacher took."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from latentforge.events import Event

_SUMMED = (
    "rows",
    "target_rows",
    "sequences",
    "on_policy_sequences",
    "on_policy_tokens",
    "target_seconds",
    "target_wait_seconds",
    "target_hidden_seconds",
)


@dataclass
class Tally:
    """Sums over the fields of step events: those of this run, and of the attempts that it goes on from.

    ``target_rows`` are the rows for which a teacher's targets were handed to the trainer, ``rows`` those that were
    trained; ``target_seconds`` the teacher took, ``target_wait_seconds`` the steps stood still for it,
    ``target_hidden_seconds`` went on behind them.
    """

    rows: int = 0
    target_rows: int = 0
    sequences: int = 0
    on_policy_sequences: int = 0
    on_policy_tokens: int = 0
    target_seconds: float = 0.0
    target_wait_seconds: float = 0.0
    target_hidden_seconds: float = 0.0

    @classmethod
    def of(cls, events: Iterable[Event], *, model: str, until: int) -> Tally:
        """The sums over a model's steps 1 to ``until`` in the events of an earlier attempt."""
        tally = cls()
        for event in events:
            if event.kind == "step" and event.fields.get("model") == model and event.fields["step"] <= until:
                tally.add(event.fields)
        return tally

    def add(self, fields: Mapping[str, Any]) -> None:
        """Add one step's."""
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + fields.get(name, 0))

    @property
    def coverage(self) -> float:
        """The share of the rows that had targets."""
        return self.target_rows / self.rows if self.rows else 0.0

    def fields(self) -> dict[str, Any]:
        """The sums by name, seconds rounded to the microsecond."""
        found = {name: getattr(self, name) for name in _SUMMED}
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()}

    def record(self) -> dict[str, Any]:
        """What ``metrics.json`` says of a model that had a teacher."""
        return {"kd_coverage": self.coverage, **self.fields()}

    def sentence(self) -> str:
        """The coverage for people; never rounded up to a whole that it is not."""
        return f"KD coverage {percent(self.coverage)} ({self.target_rows} of {self.rows} rows had targets)"


def percent(share: float) -> str:
    """A share in percent with one digit, rounded down."""
    return f"{math.floor(share * 1000 + 1e-9) / 10:.1f} %"
