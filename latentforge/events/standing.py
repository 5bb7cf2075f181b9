"""What of a run's events stands: where it went back, the steps that it makes again are not in its result."""

from __future__ import annotations

from collections.abc import Iterable

from latentforge.events.event import Event

WENT_BACK = ("resume", "rollback")
"""Phases that say ``model`` and ``step``: from that step on its steps are made again."""
_OF_A_STEP = ("step", "metric", "checkpoint")


def standing(events: Iterable[Event]) -> list[Event]:
    """The events without the steps, values and checkpoints that the run went back behind, in their order."""
    found: list[Event] = []
    for event in events:
        if event.kind == "phase" and event.fields.get("name") in WENT_BACK:
            found = [one for one in found if not _undone(one, event)]
        found.append(event)
    return found


def _undone(one: Event, back: Event) -> bool:
    step, model = one.fields.get("step"), back.fields.get("model")
    until = back.fields.get("step")
    return (
        one.kind in _OF_A_STEP
        and one.fields.get("model") == model
        and isinstance(step, int)
        and isinstance(until, int)
        and step > until
    )
