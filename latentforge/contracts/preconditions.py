"""Probing a bound: values on both sides of it, and what is no number, given to what takes the parameter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from latentforge.contracts.finding import Finding
from latentforge.contracts.schema import Precondition
from latentforge.errors import LatentForgeError


def probes(check: Precondition) -> tuple[list[Any], list[Any]]:
    """Values that must be taken, and values that must be refused."""
    inside: list[Any] = []
    outside: list[Any] = [math.nan, math.inf, -math.inf, True, "1", None]
    if check.type == "whole":
        outside.append(1.5)
    for bound, side, belongs in (
        (check.at_least, 1, True),
        (check.above, 1, False),
        (check.at_most, -1, True),
        (check.below, -1, False),
    ):
        if bound is None:
            continue
        step = side if check.type == "whole" else side * max(abs(bound), 1.0) * 1e-6
        (inside if belongs else outside).append(bound)
        inside.append(bound + step)
        outside.append(bound - step)
    return inside, outside


def judge_precondition(check: Precondition, accepts: Callable[[Any], Any]) -> Finding:
    """Whether all values inside are taken and all outside refused; errors that are no refusal are the caller's."""
    inside, outside = probes(check)
    wrong = [value for value in inside if not _taken(accepts, value)]
    wrong += [value for value in outside if _taken(accepts, value)]
    count = len(inside) + len(outside)
    text = f"{count - len(wrong)} of {count} values taken inside and refused outside"
    shown = [repr(value) for value in wrong]
    return Finding(not wrong, text + (f"; not so {', '.join(shown[:3])}" if wrong else ""), {"wrong": shown})


def _taken(accepts: Callable[[Any], Any], value: Any) -> bool:
    try:
        accepts(value)
    except (LatentForgeError, ValueError):
        return False
    return True
