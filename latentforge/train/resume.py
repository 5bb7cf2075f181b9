"""Going on where an earlier attempt stopped: its last whole checkpoint, and what its events said until then."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latentforge.errors import RefusedError
from latentforge.events import Event, EventLog, in_course, read_events, standing
from latentforge.spec.run import RunDir
from latentforge.spec.spread import without_spread
from latentforge.train.checkpoint import newest_checkpoint, step_folder
from latentforge.train.loop import Evaluation
from latentforge.train.reading import left_out_of, say_left_out


@dataclass(frozen=True)
class Earlier:
    """What a ``run`` left of one model: its last whole checkpoint, after ``step`` steps, and the run's events.

    ``path`` is the checkpoint's folder: its tensors are read when they are put back, and not held until then.
    """

    run: str
    step: int
    path: Path
    events: list[Event]


def open_predecessor(run: RunDir, log: EventLog, models: dict[str, str]) -> dict[str, Earlier]:
    """Of each model what this run left where it was begun before, else what the last attempt before it did that wrote a
    whole checkpoint of that model; a model of which none did is not among them.

    ``models`` maps each model's name to its folder below ``checkpoints`` ("" for the folder itself). Torn checkpoints
    are said and skipped. Refused where a predecessor was asked for something else.
    """
    found = _left_by(run, models, log)
    events = _events(run)
    for model in models.keys() - found.keys():
        if any(event.fields.get("model") == model for event in events):
            say_begun_again(log, model)
    ours = run.load_identity()
    before, newest = run.predecessor(), None
    while found.keys() != models.keys() and before is not None and before.path.is_dir():
        theirs = before.load_identity()
        asked = [(one.kind, without_spread(one.spec), one.inputs) for one in (ours, theirs)]
        for what, own, other in zip(("kind", "spec", "inputs"), *asked, strict=True):
            if own != other:
                raise RefusedError(f"{run.run} cannot resume {before.run}: its {what} is another")
        # What an attempt ended before the first checkpoint of, the one before it may have.
        missing = {model: below for model, below in models.items() if model not in found}
        left = _left_by(before, missing, log)
        if left and ours.code != theirs.code:
            log.warning(f"{before.run} ran other code ({theirs.code[:12]}…): its steps may not repeat bit for bit")
        found |= left
        newest, before = newest or before, before.predecessor()
    if not found and before is not None:
        log.warning(f"attempt {before.run} is not on this host any more: nothing can be taken from it")
    if not found and newest is not None:
        log.warning(f"{newest.run} left no checkpoint that is whole: starting from step 0")
    return found


def _left_by(before: RunDir, models: dict[str, str], log: EventLog) -> dict[str, Earlier]:
    found: dict[str, Earlier] = {}
    for model, below in models.items():
        folder = before.checkpoints / below
        checkpoint, said = newest_checkpoint(folder)
        for sentence in said:
            log.warning(f"{before.run}: {sentence}")
        if checkpoint is not None:
            step = checkpoint.step
            found[model] = Earlier(before.run, step, step_folder(folder, step), _events(before))
    return found


def _events(run: RunDir) -> list[Event]:
    return read_events(run.events_file) if run.events_file.is_file() else []


def say_begun_again(log: EventLog, model: str) -> None:
    """Say that nothing which this run has made of a model stands."""
    log.emit("phase", name="rollback", state="end", model=model, step=-1)


def carry_events(earlier: Earlier, model: str, *, until: int, before: int, log: EventLog) -> None:
    """Repeat the predecessor's steps and metrics of ``model`` up to step ``until``, each marked with where it is from.

    The steps that it left out are said again, all of them: those that are still to come are left out once more. So the
    first held-out loss of a resumed run is the true one of step 0, and its curve is whole. Metrics of step
    ``before``, the last one, and those of weights that were put back at the end are left out: they are measured again.
    """
    for step, why in left_out_of(earlier.events, model).items():
        say_left_out(log, model, step, why)
    for event in standing(earlier.events):
        fields = event.fields
        if event.kind not in ("step", "metric") or fields.get("model") != model or fields["step"] > until:
            continue
        if event.kind == "step" or (fields["step"] < before and in_course(event)):
            log.emit(event.kind, **{"carried_from": earlier.run, **fields})


def known_evaluation(earlier: Earlier | None, model: str) -> Evaluation | None:
    """The held-out values that the predecessor measured at step 0, where it has a checkpoint that follows from them."""
    if earlier is None:
        return None
    found = {
        event.fields["name"]: event.fields
        for event in earlier.events
        if event.kind == "metric" and (event.fields.get("model"), event.fields.get("step")) == (model, 0)
    }
    if "val_loss" not in found:
        return None
    loss, kl = found["val_loss"], found.get("val_kl")
    return Evaluation(
        float(loss["value"]), None if kl is None else float(kl["value"]), 0, str(loss.get("rows_sha256", ""))
    )
