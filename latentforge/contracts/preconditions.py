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
    outside: list[Any] = [math.nan, math.inf, -math.inf, True, "1", None]
    bounds = [one for one in (check.above, check.at_least, check.below, check.at_most) if one is not None]
    tried: list[int | float] = []
    for bound in bounds:
        tried += [bound - 1, bound, bound + 1]  # one apart: of what is just inside, a bound of its own would be hidden
        if check.type == "number":
            tried += [math.nextafter(bound, -math.inf), math.nextafter(bound, math.inf)]
    if len(bounds) == 2:
        tried.append(sum(bounds) // 2 if check.type == "whole" else sum(bounds) / 2)
    if check.type == "whole":
        outside.append(bounds[0] + 0.5)
    inside = [value for value in dict.fromkeys(tried) if check.holds(value)]
    return inside, outside + [value for value in dict.fromkeys(tried) if not check.holds(value)]


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
