"""What falsifiers read from the events of a run, and how they put their verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latentforge.events import Event, EventLog, in_course, kept_steps, of_kept
from latentforge.verdicts import Outcome, Verdict

Events = Sequence[Event]


def heldout_metric(events: Events, name: str, model: str) -> list[tuple[int, float]]:
    """(step, value) of a held-out metric after each step that it was measured after, ordered by step; a value that JSON
    cannot hold is written as text."""
    found = [(int(e.fields["step"]), float(e.fields["value"])) for e in _heldout(events, name, model) if in_course(e)]
    return sorted(found, key=lambda item: item[0])


def kept_metric(events: Events, name: str, model: str) -> dict[str, Any] | None:
    """The fields of a held-out metric of the weights that the run saves: those of the last step that was asked for, or
    of the one that was put back. None where the events do not say it of these, or not which these are."""
    section = {"student": "distill", "twin": "distill"}.get(model, model)
    asked = ready_of(events).get("requested", {}).get(section, {})
    step = kept_steps(events).get(model, asked.get("steps") if asked.get("keep") != "best" else None)
    if step is None:
        return None
    found = of_kept(_heldout(events, name, model), step)
    return None if found is None else found.fields


def _heldout(events: Events, name: str, model: str) -> list[Event]:
    of = (name, "heldout", model)
    return [e for e in events if e.kind == "metric" and tuple(map(e.fields.get, ("name", "split", "model"))) == of]


def steps_of(events: Events, model: str) -> dict[int, dict[str, Any]]:
    """The step events of a model by number."""
    return {e.fields["step"]: e.fields for e in events if e.kind == "step" and e.fields.get("model") == model}


SKIPPED = "skipped_step"
"""The name in a warning's event that says which step (from 1) of a ``model`` was left out, and ``why``."""


def left_out_of(events: Events, model: str) -> dict[int, str]:
    """The steps of a model (from 1) whose batches were left out, and why."""
    found = [e.fields for e in events if e.kind == "warning" and e.fields.get("name") == SKIPPED]
    return {fields["step"]: fields["why"] for fields in found if fields["model"] == model}


def say_left_out(log: EventLog, model: str, step: int, why: str) -> None:
    """Record that the batch of ``step`` (from 1) was left out."""
    message = f"step {step} of the {model} was left out: {why}"
    log.emit("warning", message=message, name=SKIPPED, model=model, step=step, why=why)
    log.say(f"warning: {message}")


def ready_of(events: Events) -> dict[str, Any]:
    """The fields of the ready event: what was asked, and what was in force; empty where there is none."""
    found = [e.fields for e in events if e.kind == "phase" and e.fields.get("name") == "ready"]
    return found[-1] if found else {}


def run_of(events: Events) -> str | None:
    """The run that the events are of."""
    return events[-1].run if events else None


def outcome_of(passed: bool | None) -> Outcome:
    """None is not known."""
    return Outcome.UNKNOWN if passed is None else Outcome.PASS if passed else Outcome.FAIL


def verdict_of(
    events: Events, name: str, passed: bool | None, text: str, measured: dict[str, Any] | None = None
) -> Verdict:
    """The verdict ``name`` over a run's events; ``passed`` None is not known."""
    return Verdict(name, outcome_of(passed), text, measured or {}, run_of(events))
