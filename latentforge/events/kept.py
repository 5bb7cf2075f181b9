"""Of which step a run's weights are, and which of its held-out values are theirs.

A run that keeps its best step, or that merges adapters into its product, says each held-out value of the weights that
it saves once more, with their step and marked ``kept``: of all values, those say what its product can do.
"""

from __future__ import annotations

from collections.abc import Iterable

from latentforge.events.event import Event

KEPT_STEP = "kept_step"
"""The metric that says which step's weights were put back at the end; a run that keeps the last one's has none."""
KEPT = "kept"
"""The mark in a metric's event: measured once more, of the weights that are saved."""


def kept_steps(events: Iterable[Event]) -> dict[str, int]:
    """The step whose weights were put back, by model; without those models that keep their last step's in any case."""
    return {
        str(event.fields.get("model")): event.fields["value"]
        for event in events
        if event.kind == "metric"
        and event.fields.get("name") == KEPT_STEP
        and isinstance(event.fields.get("value"), int)
        # With a split it is of a log in which the last step's values were those of the weights that were put back.
        and event.fields.get("split") is None
    }


def in_course(event: Event) -> bool:
    """Whether a metric was measured in its step's turn, as those of charts are."""
    return not event.fields.get(KEPT)


def of_kept(seen: Iterable[Event], step: int | None) -> Event | None:
    """Of the events of one metric of one model, that of the saved weights, which are those of ``step`` (None: the
    last one's). None where that was not said: another step's value is no answer."""
    course, marked = list[Event](), list[Event]()
    for event in seen:
        (course if in_course(event) else marked).append(event)
    of_step = [event for event in marked if step in (None, event.fields.get("step"))]
    if of_step:
        return of_step[-1]
    last = course[-1] if course else None
    return last if last is not None and step in (None, last.fields.get("step")) else None
