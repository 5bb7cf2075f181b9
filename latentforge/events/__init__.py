"""Events: one JSON line for each thing that a run did, and the same story as text for people and ``grep``."""

from latentforge.events.event import KINDS, Event, parse_event, read_events, sift_events
from latentforge.events.kept import KEPT, KEPT_STEP, in_course, kept_steps, of_kept
from latentforge.events.log import EventLog
from latentforge.events.standing import standing

__all__ = [
    "KEPT",
    "KEPT_STEP",
    "KINDS",
    "Event",
    "EventLog",
    "in_course",
    "kept_steps",
    "of_kept",
    "parse_event",
    "read_events",
    "sift_events",
    "standing",
]
