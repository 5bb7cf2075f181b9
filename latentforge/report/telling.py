"""One or two sentences of what happened, from what the run's own events say; what they do not say is not said."""

from __future__ import annotations

import math
from typing import Any

from latentforge.evidence.reading import RunRecord
from latentforge.evidence.statement import gainsays
from latentforge.report.words import duration, is_number, number, once, plain, worded
from latentforge.verdicts import Outcome

_NAMES = {
    "data": "data",
    "teacher": "a teacher",
    "score": "a teacher's targets",
    "continuations": "a teacher's continuations",
    "autoencoder": "a codec",
    "distill": "a student",
    "latent": "a latent student",
    "bench": "a bench",
    "follow": "a host's part in the run of another",
}


def headline(record: RunRecord) -> str:
    """What kind of run it is, in a few words: ``distill: a student``, ``distill: the canary of a student``."""
    canary = "the canary of " if record.identity is not None and record.identity.is_canary else ""
    return f"{record.kind}: {canary}{_NAMES.get(record.kind, 'a run')}"


def state(record: RunRecord) -> str:
    """One word for the badge: ``pass``, ``fail``, ``refused``, ``interrupted``, ``nothing recorded`` or ``unknown``."""
    if not record.events:
        return "nothing recorded"
    if record.end.get("code") is None:
        return "interrupted"
    if record.end.get("code") == 2:
        return "refused"
    return record.outcome.name.lower()


def sentence(record: RunRecord) -> str:
    """What happened."""
    told = [_ended(record), _happened(record), _judged(record)]
    return plain(" ".join(part for part in told if part))


def _ended(record: RunRecord) -> str | None:
    if not record.events:
        return "The folder holds no events of this run: what happened is not known." + _host_says(record)
    if record.end.get("code") is None:
        last = record.events[-1]
        return (
            f"The log stops {_reached(record)}, {duration(last.t - record.events[0].t)} after it began, "
            f"without a last event: what came after is not known." + _host_says(record)
        )
    if record.end["code"] == 2:
        return f"It was refused{_because(record)}"
    if record.end["code"] not in (0, 1):
        return f"It ended with code {record.end['code']}{_because(record)}{_host_says(record)}"
    early = f"It ended early{_because(record)} " if record.reason else ""
    if gainsays(record.end.get("record"), record.end["code"]):
        told = f"Its log ends with code {record.end['code']}, but its host says otherwise: how it ended is not known."
        return f"{early}{told}{_host_says(record)}"
    return early.rstrip() or None


def _because(record: RunRecord) -> str:
    return f": {record.reason.rstrip('.')}." if record.reason else "."


def _host_says(record: RunRecord) -> str:
    told: Any = record.end.get("record")
    if not isinstance(told, dict):
        return ""
    parts = [str(told["outcome"])] if told.get("outcome") else []
    parts += [f"code {told['code']}"] if told.get("code") is not None else []
    parts += [f"signal {told['signal']}"] if told.get("signal") else []
    parts += ["out of memory"] if told.get("oom") else []
    parts += [str(told["reason"])] if told.get("reason") else []
    return f" Its host recorded: {', '.join(parts)}." if parts else ""


def _reached(record: RunRecord) -> str:
    steps = [event for event in record.events if event.kind == "step"]
    if steps:
        last = steps[-1].fields
        return f"at step {worded(last.get('step'))} of {worded(last.get('steps'))} of the {last.get('model', 'model')}"
    begun = [phase for phase in record.phases if phase.seconds is None]
    return f"in the phase “{begun[-1].name}”" if begun else "before anything was trained"


def _happened(record: RunRecord) -> str | None:
    if record.kind == "bench":
        return _measured(record)
    student = {"distill": "student", "latent": "latent", "teacher": "teacher", "autoencoder": "autoencoder"}
    model = student.get(record.kind)
    if model is None:
        return _made(record)
    loss = record.metric("val_loss", model=model, split="heldout")
    if loss is None or loss.kept is None or len(loss.values) < 2:
        return None
    step, value = loss.kept
    who = {"autoencoder": "codec", "latent": "latent student"}.get(model, model)
    size = (record.effective or {}).get("parameters")
    size_told = f" of {number(size)} parameters" if is_number(size) else ""
    held = "nats a token" if record.kind != "latent" else "as its loss is measured"
    told = (
        f"In {once(loss.steps[-1] - loss.steps[0], 'step')} the {who}{size_told} "
        f"{_changed(loss.values[0], value)} its held-out loss from {number(loss.values[0])} to {number(value)} ({held})"
    )
    if step != loss.steps[-1]:
        told += f", that of step {number(step)}, which is kept; the last was {number(loss.values[-1])}"
    kl = record.metric("val_kl", model=model, split="heldout")
    twin = record.metric("val_kl", model="twin", split="heldout")
    if kl is not None and kl.kept is not None:
        told += f"; its KL to the teacher is {number(kl.kept[1])}"
        told += f", that of its twin without a teacher {number(twin.kept[1])}" if twin and twin.kept else ""
    accuracy = record.metric("token_accuracy", model=model, split="heldout")
    if accuracy is not None and accuracy.kept is not None:
        told += f"; {100 * accuracy.kept[1]:.2f} % of the held-out tokens came back"
    return told + "."


def _changed(first: float, last: float) -> str:
    if not (math.isfinite(first) and math.isfinite(last)):
        return "moved"
    return "lowered" if last < first else "raised" if last > first else "left"


def _made(record: RunRecord) -> str | None:
    if not record.phases or record.end.get("code") != 0:
        return None
    seconds = sum(phase.seconds or 0.0 for phase in record.phases)
    return f"It made {_NAMES.get(record.kind, 'its product')} in {duration(seconds)}."


def _measured(record: RunRecord) -> str | None:
    speeds = [one for one in record.metrics if one.name == "tokens_per_second"]
    if not speeds:
        return None
    first, *others = speeds
    told = f"“{first.model}” wrote {number(first.values[-1])} tokens/s"
    for other in others[:1]:
        ratio = first.values[-1] / other.values[-1] if other.values[-1] else math.nan
        told += f", {number(ratio, 3)} times “{other.model}” ({number(other.values[-1])})"
    return told + "."


def _judged(record: RunRecord) -> str | None:
    if not record.verdicts:
        return "No check judged it." if record.events and record.end.get("code") == 0 else None
    passed = sum(one.outcome is Outcome.PASS for one in record.verdicts)
    if passed == len(record.verdicts):
        return f"All {once(passed, 'check')} pass." if passed > 1 else "Its one check passes."
    worst = [one for one in record.verdicts if one.outcome is Outcome.FAIL]
    unknown = len(record.verdicts) - passed - len(worst)
    told = f"{passed} of {once(len(record.verdicts), 'check')} pass"
    told += f", {number(len(worst))} {'fails' if len(worst) == 1 else 'fail'}" if worst else ""
    told += f", {number(unknown)} {'is' if unknown == 1 else 'are'} not known" if unknown else ""
    first = (worst or [one for one in record.verdicts if one.outcome is Outcome.UNKNOWN])[0]
    return f"{told}: {first.falsifier}, {first.text}." if first.text else f"{told}: {first.falsifier}."
