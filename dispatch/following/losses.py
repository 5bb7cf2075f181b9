"""What the raw loss of each step says while a run goes on: not a number, diverging, not learning."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

WINDOW = 20
DIVERGED, BETTER = 1.5, 0.995
PLATEAU_STEPS, PLATEAU_SHARE = 100, 0.25


@dataclass(frozen=True)
class Remark:
    """Something that was noticed of a run: a warning, or red. There is no green remark."""

    colour: Literal["warning", "red"]
    rule: str
    text: str


@dataclass
class _Model:
    last: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    seen: int = 0
    first: float | None = None
    best: float = math.inf
    best_step: int = 0
    told: set[str] = field(default_factory=set)


class LossRules:
    """Rules on each model's raw step losses; what a log calls its best or its mean does not enter.

    Red: a loss that is no finite number; a median of 20 steps above 1.5 times that of the first 20. Warning: above 1.5
    times the best one; no better by half a per cent over a quarter of the steps (100 at least).
    """

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}

    def feed(self, fields: dict[str, Any]) -> list[Remark]:
        """Take a step event's fields in; each rule speaks once a model."""
        model, step, steps = str(fields.get("model", "")), fields.get("step"), fields.get("steps")
        one = self._models.setdefault(model, _Model())
        loss = _loss(fields.get("loss"))
        if loss is None or not isinstance(step, int):
            return []
        found = [Remark(*said) for said in self._judge(one, loss, step, steps, f"{model or 'model'} at step {step}")]
        fresh = [remark for remark in found if remark.rule not in one.told]
        one.told |= {remark.rule for remark in fresh}
        return fresh

    def _judge(self, one: _Model, loss: float, step: int, steps: Any, who: str) -> list[tuple[Any, str, str]]:
        if not math.isfinite(loss):
            return [("red", "not-finite", f"loss of the {who} is {loss}")]
        one.last.append(loss)
        one.seen += 1
        if len(one.last) < WINDOW:
            return []
        middle = middle_of(one.last)
        if one.first is None:
            one.first, one.best, one.best_step = middle, middle, step
        if middle < one.best * BETTER:
            one.best, one.best_step = middle, step
        found: list[tuple[Any, str, str]] = []
        if one.seen >= 2 * WINDOW and middle > DIVERGED * one.first > 0:
            found.append(
                ("red", "diverged", f"loss of the {who} is {middle:.4g}, it began at {one.first:.4g}: diverged")
            )
        elif middle > DIVERGED * one.best > 0:
            found.append(("warning", "rising", f"loss of the {who} is {middle:.4g}, its best was {one.best:.4g}"))
        patience = max(PLATEAU_STEPS, PLATEAU_SHARE * steps if isinstance(steps, int) else 0)
        if step - one.best_step >= patience:
            told = f"loss of the {who} is {middle:.4g}, no better than at step {one.best_step}: a plateau"
            found.append(("warning", "plateau", told))
        return found


def middle_of(values: Collection[float]) -> float:
    """The (upper) median; the standard library's is slow to import."""
    return sorted(values)[len(values) // 2]


def _loss(value: Any) -> float | None:
    """A loss as an event holds it: a number, or the name of what JSON has no number for."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
