"""Going on where an earlier attempt stopped: its last whole checkpoint, and what its events said until then."""

from __future__ import annotations

from dataclasses import dataclass

from latentforge.errors import RefusedError
from latentforge.events import Event, EventLog, read_events, standing
from latentforge.spec.run import RunDir
from latentforge.spec.spread import without_spread
from latentforge.train.checkpoint import Checkpoint, newest_checkpoint
from latentforge.train.loop import Evaluation
from latentforge.train.reading import left_out_of, say_left_out


@dataclass(frozen=True)
class Earlier:
    """The predecessor of a run: its last whole checkpoint of each model, and its events."""

    run: str
    checkpoints: dict[str, Checkpoint]
    events: list[Event]


def open_predecessor(run: RunDir, log: EventLog, models: dict[str, str]) -> Earlier | None:
    """What this run left where it was begun before, else the last attempt before it that wrote a whole checkpoint, or
    None where there is no attempt.

    ``models`` maps each model's name to its folder below ``checkpoints`` ("" for the folder itself). Torn checkpoints
    are said and skipped. Refused where the predecessor was asked for something else.
    """
    own = _left_by(run, models, log)
    for model in models.keys() - own.checkpoints.keys():
        if any(event.fields.get("model") == model for event in own.events):
            say_begun_again(log, model)
    if own.checkpoints:
        return own
    ours = run.load_identity()
    before, newest = run.predecessor(), None
    while before is not None and before.path.is_dir():
        theirs = before.load_identity()
        asked = [(one.kind, without_spread(one.spec), one.inputs) for one in (ours, theirs)]
        for what, own, other in zip(("kind", "spec", "inputs"), *asked, strict=True):
            if own != other:
                raise RefusedError(f"{run.run} cannot resume {before.run}: its {what} is another")
        earlier = _left_by(before, models, log)
        if earlier.checkpoints:
            if ours.code != theirs.code:
                log.warning(f"{before.run} ran other code ({theirs.code[:12]}…): its steps may not repeat bit for bit")
            return earlier
        # An attempt that ended before its first checkpoint hands on nothing: the one before it may have one.
        newest, before = newest or earlier, before.predecessor()
    if before is not None:
        log.warning(f"attempt {before.run} is not on this host any more: nothing can be taken from it")
    return newest


def _left_by(before: RunDir, models: dict[str, str], log: EventLog) -> Earlier:
    found: dict[str, Checkpoint] = {}
    for model, below in models.items():
        checkpoint, said = newest_checkpoint(before.checkpoints / below)
        for sentence in said:
            log.warning(f"{before.run}: {sentence}")
        if checkpoint is not None:
            found[model] = checkpoint
    events = read_events(before.events_file) if before.events_file.is_file() else []
    return Earlier(before.run, found, events)


def say_begun_again(log: EventLog, model: str) -> None:
    """Say that nothing which this run has made of a model stands."""
    log.emit("phase", name="rollback", state="end", model=model, step=-1)


def carry_events(earlier: Earlier, model: str, *, until: int, before: int, log: EventLog) -> None:
    """Repeat the predecessor's steps and metrics of ``model`` up to step ``until``, each marked with where it is from.

    The steps that it left out are said again, all of them: those that are still to come are left out once more. So the
    first held-out loss of a resumed run is the true one of step 0, and its curve is whole. Metrics of step
    ``before``, the last one, are left out: they are measured again.
    """
    for step, why in left_out_of(earlier.events, model).items():
        say_left_out(log, model, step, why)
    for event in standing(earlier.events):
        fields = event.fields
        if event.kind not in ("step", "metric") or fields.get("model") != model or fields["step"] > until:
            continue
        if event.kind == "step" or fields["step"] < before:
            log.emit(event.kind, **{"carried_from": earlier.run, **fields})


def known_evaluation(earlier: Earlier | None, model: str) -> Evaluation | None:
    """The held-out values that the predecessor measured at step 0, where it has a checkpoint that follows from them."""
    if earlier is None or model not in earlier.checkpoints:
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
