"""What of a run's events stands: where it went back, the steps that it makes again are not in its result."""

from __future__ import annotations

from collections.abc import Iterable

from latentforge.events.event import Event
from latentforge.events.kept import in_course

WENT_BACK = ("resume", "rollback")
"""Phases that say ``model`` and ``step``: what came after that step is made again. Where they say of how many ``steps``
it is, so are the held-out values of the last one, and those of the weights that were kept at the end."""
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
    step, until, steps = one.fields.get("step"), back.fields.get("step"), back.fields.get("steps")
    if one.kind not in _OF_A_STEP or one.fields.get("model") != back.fields.get("model"):
        return False
    if not isinstance(step, int) or not isinstance(until, int):
        return False
    at_the_end = one.kind == "metric" and isinstance(steps, int) and (step >= steps or not in_course(one))
    return step > until or at_the_end
