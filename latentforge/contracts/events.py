"""Judging a predicate over a run's events: of what is not there, or does not say, nothing is known."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from latentforge.contracts.finding import Finding
from latentforge.contracts.schema import NOT_FINITE, EventCheck
from latentforge.events import Event

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    "=": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
}


def judge_events(check: EventCheck, events: Sequence[Event], *, change: Mapping[str, Any] | None = None) -> Finding:
    """Whether the predicate holds. Undecided where no event is looked at, or one does not state what is compared.

    ``change`` plants these fields into the last event that is looked at, of ``some`` into all of them.
    """
    chosen = [event for event in events if _chosen(check, event)]
    what = f"{check.kind} event" + "".join(f" {name}={_shown(value)}" for name, value in check.where.items())
    if not chosen:
        return Finding(None, f"there is no {what}: nothing was looked at", {"events": 0})
    if change is not None:
        first = 0 if check.quantifier == "some" else len(chosen) - 1
        planted = [replace(event, fields={**event.fields, **change}) for event in chosen[first:]]
        chosen = chosen[:first] + planted
    looked_at = chosen[-1:] if check.quantifier == "last" else chosen
    told = [_sides(check, event) for event in looked_at]
    silent = sum(sides is None for sides in told)
    if silent:
        return Finding(None, f"{silent} of {len(told)} {what}s do not state {_stated(check)}", {"events": len(told)})
    # What is not finite is neither more nor less, nor is it different: it counts against the claim, whichever it is.
    unheld = check.quantifier == "none"
    held = [_holds(check.comparison, *sides) if _finite(sides) else unheld for sides in told if sides is not None]
    count = sum(held)
    passed = {"every": count == len(held), "last": held[-1], "some": count > 0, "none": count == 0}[check.quantifier]
    text = f"{check.field} {check.comparison} {_against(check)} in {count} of {len(held)} {what}s"
    odd = [event for event, one in zip(looked_at, held, strict=True) if one is unheld]
    if not passed and odd:
        text += f"; seq {odd[0].seq}: {_values(check, odd[0])}"
    return Finding(bool(passed), text, {"events": len(held), "held": count})


def _chosen(check: EventCheck, event: Event) -> bool:
    if event.kind != check.kind:
        return False
    return all(name in event.fields and _same(event.fields[name], value) for name, value in check.where.items())


def _same(left: Any, right: Any) -> bool:
    return isinstance(left, bool) is isinstance(right, bool) and bool(left == right)  # to Python True is 1


def _sides(check: EventCheck, event: Event) -> tuple[Any, Any] | None:
    """What is compared; None where the event does not state it, or states what cannot be compared so."""
    if check.field not in event.fields or (check.other is not None and check.other not in event.fields):
        return None
    left, right = (
        float(value) if value in NOT_FINITE else value
        for value in (event.fields[check.field], check.value if check.other is None else event.fields[check.other])
    )
    if _is_number(left) and _is_number(right):
        return left, right
    equality = check.comparison in ("=", "!=") and isinstance(left, bool | str) and type(left) is type(right)
    return (left, right) if equality else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(sides: tuple[Any, Any]) -> bool:
    return not any(isinstance(value, float) and not math.isfinite(value) for value in sides)


def _holds(comparison: str, left: Any, right: Any) -> bool:
    return bool(_COMPARISONS[comparison](left, right))


def _against(check: EventCheck) -> str:
    return check.other if check.other is not None else _shown(check.value)


def _stated(check: EventCheck) -> str:
    return " and ".join(name for name in (check.field, check.other) if name is not None)


def _values(check: EventCheck, event: Event) -> str:
    names = [name for name in (check.field, check.other) if name is not None]
    return ", ".join(f"{name} {_shown(event.fields[name])}" for name in names)


def _shown(value: Any) -> str:
    """A value of an event in one printable line, whatever a run wrote."""
    text = str(value)
    return text if text.isprintable() else repr(text)
