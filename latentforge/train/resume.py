"""Going on where an earlier attempt stopped: its last whole checkpoint, and what its events said until then."""

from __future__ import annotations

from dataclasses import dataclass

from latentforge.errors import RefusedError
from latentforge.events import Event, EventLog, read_events
from latentforge.spec.run import RunDir
from latentforge.train.checkpoint import Checkpoint, newest_checkpoint


@dataclass(frozen=True)
class Earlier:
    """The predecessor of a run: its last whole checkpoint of each model, and its events."""

    run: str
    checkpoints: dict[str, Checkpoint]
    events: list[Event]


def open_predecessor(run: RunDir, log: EventLog, models: dict[str, str]) -> Earlier | None:
    """What the attempt named in ``launch.json`` left, or None where there is none.

    ``models`` maps each model's name to its folder below ``checkpoints`` ("" for the folder itself). Torn checkpoints
    are said and skipped. Refused where the predecessor was asked for something else.
    """
    before = run.predecessor()
    if before is None:
        return None
    ours, theirs = run.load_identity(), before.load_identity()
    for what in ("kind", "spec", "inputs"):
        if getattr(ours, what) != getattr(theirs, what):
            raise RefusedError(f"{run.run} cannot resume {before.run}: its {what} is another")
    if ours.code != theirs.code:
        log.warning(f"{before.run} ran other code ({theirs.code[:12]}…): its steps may not repeat bit for bit")
    found: dict[str, Checkpoint] = {}
    for model, below in models.items():
        checkpoint, said = newest_checkpoint(before.checkpoints / below)
        for sentence in said:
            log.warning(f"{before.run}: {sentence}")
        if checkpoint is not None:
            found[model] = checkpoint
    events = read_events(before.events_file) if before.events_file.is_file() else []
    return Earlier(before.run, found, events)


def carry_events(earlier: Earlier, model: str, *, until: int, before: int, log: EventLog) -> None:
    """Repeat the predecessor's steps and metrics of ``model`` up to step ``until``, each marked with where it is from.

    So the first held-out loss of a resumed run is the true one of step 0, and its curve is whole. Metrics of step
    ``before``, the last one, are left out: they are measured again.
    """
    for event in earlier.events:
        fields = event.fields
        if event.kind not in ("step", "metric") or fields.get("model") != model or fields["step"] > until:
            continue
        if event.kind == "step" or fields["step"] < before:
            log.emit(event.kind, **{"carried_from": earlier.run, **fields})
