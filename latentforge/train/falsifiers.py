"""What would show that a run did not do what it says: pure functions over the run's events."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from latentforge.events import standing
from latentforge.spec.canary import CANARY, LATENT_CANARY
from latentforge.train.canary_falsifiers import canary_001, latent_canary_001
from latentforge.train.codec_falsifiers import latent_ae_001, latent_ae_002
from latentforge.train.effective import differences
from latentforge.train.latent_falsifiers import latent_causal_001, latent_kd_001
from latentforge.train.optimiser import warmup_cosine
from latentforge.train.reading import (
    Events,
    heldout_metric,
    kept_metric,
    left_out_of,
    outcome_of,
    ready_of,
    run_of,
    steps_of,
    verdict_of,
)
from latentforge.train.tally import percent
from latentforge.verdicts import Outcome, Verdict


def smoke_001(events: Events) -> Verdict:
    """F-DISTILL-SMOKE-001: held-out cross-entropy of the saved weights is lower than before the first step, on the same
    rows."""
    return _fell(events, "F-DISTILL-SMOKE-001")


def pipeline_001(events: Events) -> Verdict:
    """F-DISTILL-PIPELINE-001: the whole line ran; the student trained all its steps and the held-out loss fell."""
    asked = ready_of(events).get("requested", {}).get("distill", {}).get("steps")
    done = len(steps_of(events, "student"))
    if asked is None or done != asked:
        return verdict_of(events, "F-DISTILL-PIPELINE-001", None, f"{done} of {asked} steps are in the events")
    return _fell(events, "F-DISTILL-PIPELINE-001")


def smoke_002(events: Events) -> Verdict:
    """F-DISTILL-SMOKE-002: held-out KL to the teacher ends below that of the twin trained without it: each at the step
    whose weights it keeps, after as many steps.

    That student and twin had the same start, the same batches and the same held-out rows is read from the events too.
    """
    name = "F-DISTILL-SMOKE-002"
    student, twin = heldout_metric(events, "val_kl", "student"), heldout_metric(events, "val_kl", "twin")
    if len(student) < 2 or len(twin) < 1:
        return verdict_of(
            events, name, None, "val_kl of the student at both ends, and of its twin, is not in the events"
        )
    (first, _), (step, _), (twin_step, _) = student[0], student[-1], twin[-1]
    if first == step or step != twin_step:
        return verdict_of(events, name, None, f"student ended at step {step}, twin at step {twin_step}")
    own, other = kept_metric(events, "val_kl", "student"), kept_metric(events, "val_kl", "twin")
    if own is None or other is None:
        return verdict_of(events, name, None, "val_kl of the weights that were kept is not in the events")
    ours, theirs = float(own["value"]), float(other["value"])
    measured = {"val_kl": ours, "twin_val_kl": theirs, "step": own["step"], "twin_step": other["step"]}
    unlike = _unlike_twin(events)
    if unlike is not None:
        passed, reason = unlike
        return verdict_of(events, name, passed, reason, measured)
    if not (math.isfinite(ours) and math.isfinite(theirs)):
        return verdict_of(events, name, False, f"val_kl {ours}, twin {theirs}: not finite", measured)
    relation = "<" if ours < theirs else ">="
    text = f"val_kl {ours:.4f} {relation} {theirs:.4f} of its twin without KD"
    if (own["step"], other["step"]) != (step, step):
        text += f", kept of steps {own['step']} and {other['step']}"
    return verdict_of(events, name, ours < theirs, text, measured)


def artefact_size_001(events: Events) -> Verdict:
    """F-ARTEFACT-SIZE-001: every checkpoint and product weighs at least its tensors."""
    found = [e.fields for e in events if e.kind == "checkpoint"]
    return size_verdict(found, run=run_of(events))


def size_verdict(found: Sequence[dict[str, Any]], *, run: str | None = None) -> Verdict:
    """The same over (bytes, expected_bytes) records, as the contract check calls it."""
    name = "F-ARTEFACT-SIZE-001"
    if not found:
        return Verdict(name, Outcome.UNKNOWN, "no artefact is in the events", run=run)
    worst = min(found, key=lambda item: item["bytes"] - item["expected_bytes"])
    text = f"{worst['path']} {worst['bytes']} bytes, its tensors need {worst['expected_bytes']}"
    measured = {name: worst[name] for name in ("path", "bytes", "expected_bytes")} | {"artefacts": len(found)}
    return Verdict(name, outcome_of(worst["bytes"] >= worst["expected_bytes"] > 0), text, measured, run)


def artefact_moved_001(events: Events) -> Verdict:
    """F-ARTEFACT-MOVED-001: every trained tensor of the saved model (its fp32 master) differs from the start."""
    name = "F-ARTEFACT-MOVED-001"
    products = [e.fields for e in events if e.kind == "checkpoint" and e.fields.get("product")]
    if not products:
        return verdict_of(events, name, None, "no product is in the events")
    last = products[-1]
    moved, trained, unmoved = last["moved"], last["tensors"], last.get("unmoved", [])
    text = f"{moved} of {trained} tensors moved" + (f"; unmoved: {', '.join(unmoved[:3])}" if unmoved else "")
    return verdict_of(events, name, moved == trained and trained > 0, text, {"moved": moved, "tensors": trained})


def artefact_frozen_001(events: Events) -> Verdict:
    """F-ARTEFACT-FROZEN-001: beside adapters, every tensor of the student is the one that it started from."""
    name = "F-ARTEFACT-FROZEN-001"
    products = [e.fields for e in events if e.kind == "checkpoint" and e.fields.get("product")]
    if not products or "frozen" not in products[-1]:
        return verdict_of(events, name, None, "no product of adapters is in the events")
    count, changed = products[-1]["frozen"], products[-1]["frozen_changed"]
    text = f"{count - len(changed)} of {count} frozen tensors are as they were"
    text += f"; changed: {', '.join(changed[:3])}" if changed else ""
    return verdict_of(events, name, count > 0 and not changed, text, {"frozen": count, "changed": len(changed)})


def effective_config_001(events: Events) -> Verdict:
    """F-EFFECTIVE-CONFIG-001: what was in force when set-up ended is what was asked."""
    name = "F-EFFECTIVE-CONFIG-001"
    ready = ready_of(events)
    if not ready:
        return verdict_of(events, name, None, "the run never became ready")
    kind = (run_of(events) or "").partition("-")[0]
    found = differences(kind, ready["requested"], ready["effective"])
    compared = len(ready["effective"].get(kind, {}))
    text = "; ".join(found) if found else f"{compared} values in force are those asked for"
    return verdict_of(events, name, not found, text, {"differences": found, "values": compared})


def effective_lr_001(events: Events) -> Verdict:
    """F-EFFECTIVE-LR-001: the optimiser's learning rate at every step is the requested schedule's."""
    name = "F-EFFECTIVE-LR-001"
    run = run_of(events) or ""
    kind = run.partition("-")[0]
    asked = ready_of(events).get("requested", {}).get(kind)
    steps = steps_of(events, "student" if kind == "distill" else kind)
    if not asked or not steps:
        return verdict_of(events, name, None, "no steps are in the events")
    schedule = warmup_cosine(asked["warmup_steps"], asked["steps"])
    worst, at = 0.0, 0
    for step, fields in steps.items():
        wanted = asked["learning_rate"] * schedule(step - 1)
        off = abs(float(fields["learning_rate"]) - wanted) / wanted  # not a number is written as text
        off = math.inf if math.isnan(off) else off  # NaN is below nothing: the next step's would take its place
        worst, at = (off, step) if off > worst else (worst, at)
    measured = {"worst_relative": worst, "steps": len(steps), "peak": asked["learning_rate"]}
    if worst <= 1e-9:
        return verdict_of(events, name, True, f"learning rate as asked at {len(steps)} steps", measured)
    text = f"learning rate off by {worst:.2%} at step {at} (peak asked {asked['learning_rate']:g})"
    return verdict_of(events, name, False, text, measured)


def batch_rows_001(events: Events) -> Verdict:
    """F-BATCH-ROWS-001: every step that was asked is there, or is said to be left out; each trained all predictions of
    its batch, divided by them.

    The padding of chunks, which a step says, is no prediction.
    """
    name = "F-BATCH-ROWS-001"
    kind = (run_of(events) or "").partition("-")[0]
    ready = ready_of(events)
    asked = ready.get("requested", {}).get(kind)
    steps = [e.fields for e in events if e.kind == "step"]
    if not asked or not steps:
        return verdict_of(events, name, None, "no steps are in the events")
    per_sequence = ready["effective"]["predictions_per_sequence"]
    wanted = asked["batch_size"] * per_sequence
    wrong = [
        s
        for s in steps
        if s["rows"] + s.get("padding", 0) != wanted
        or s["rows"] != s["denominator"]
        or s["sequences"] != asked["batch_size"]
    ]
    measured = {"steps": len(steps), "rows": wanted, "wrong_steps": len(wrong)}
    for model in dict.fromkeys(s["model"] for s in steps):
        left_out = left_out_of(events, model)
        missing = sorted(set(range(1, asked["steps"] + 1)) - steps_of(events, model).keys() - left_out.keys())
        if missing:
            text = (
                f"{model} made {asked['steps'] - len(missing)} of {asked['steps']} steps: step {missing[0]} is missing"
            )
            return verdict_of(events, name, False, text, {**measured, "missing_steps": len(missing)})
    if wrong:
        s = wrong[0]
        text = f"step {s['step']}: {s['rows']} rows over {s['denominator']}, {wanted} were asked"
        return verdict_of(events, name, False, text, measured)
    padding = sum(s.get("padding", 0) for s in steps)
    skipped = sum(len(left_out_of(events, model)) for model in dict.fromkeys(s["model"] for s in steps))
    if skipped:
        text = f"{wanted} of {wanted} rows trained at each of {len(steps)} steps; {skipped} were left out, and said so"
        return verdict_of(events, name, True, text, measured | {"left_out_steps": skipped})
    if padding:
        measured["padding"] = padding
        text = f"all tokens of {wanted} places trained at each of {len(steps)} steps; {padding} places were padding"
        return verdict_of(events, name, True, text, measured)
    return verdict_of(events, name, True, f"{wanted} of {wanted} rows trained at each of {len(steps)} steps", measured)


def kernel_nojit_001(events: Events) -> Verdict:
    """F-KERNEL-NOJIT-001: after the ready event nothing was compiled, or loaded for the first time by a compiler."""
    name = "F-KERNEL-NOJIT-001"
    ready = [number for number, e in enumerate(events) if e.kind == "phase" and e.fields.get("name") == "ready"]
    # A run that was begun again has more than one; what each begin compiles before it is not in its events.
    after = events[ready[0] :] if ready else []
    steps = [e.fields for e in after if e.kind == "step"]
    if not steps or any("compiles" not in fields for fields in steps):
        return verdict_of(events, name, None, "the events do not say what was compiled at each step")
    found = [e.fields for e in after if e.kind == "compile"]
    count = max(sum(fields["count"] for fields in found), sum(fields["compiles"] for fields in steps))
    measured = {"compiles": count, "steps": len(steps)}
    if count == 0:
        return verdict_of(events, name, True, f"0 compiles since ready, {len(steps)} steps", measured)
    first = found[0] if found else {"compiler": "a compiler", "step": "?"}
    text = f"{count} compiles since ready, the first by step {first['step']} ({first['compiler']})"
    return verdict_of(events, name, False, text, measured)


def coverage_001(events: Events) -> Verdict:
    """F-TEACHER-COVERAGE-001: the KD coverage that the run reports is that of the rows that its steps passed to the KD
    loss; all of them where a lost teacher was to stop the run, but for those that it answered with nothing, and some.
    """
    name = "F-TEACHER-COVERAGE-001"
    asked = ready_of(events).get("requested", {}).get("distill", {})
    if asked.get("kd_weight") == 0:
        return verdict_of(events, name, True, "no KD was asked for: kd_weight = 0", {"rows_with_targets": 0})
    steps = steps_of(events, "student")
    said = [
        e.fields
        for e in events
        if e.kind == "metric" and (e.fields.get("name"), e.fields.get("model")) == ("kd_coverage", "student")
    ]
    if not steps or not said or said[-1]["step"] != max(steps) or any("kd_rows" not in s for s in steps.values()):
        return verdict_of(events, name, None, "the events do not say which rows had targets")
    rows, taught = (sum(fields[what] for fields in steps.values()) for what in ("rows", "kd_rows"))
    reported = said[-1]
    silent = sum(fields.get("silent_rows", 0) for fields in steps.values())
    measured = {"coverage": taught / rows, "rows_with_targets": taught, "rows": rows, "reported": reported["value"]}
    measured["silent_rows"] = silent
    text = f"KD coverage {percent(taught / rows)}: {taught} of {rows} rows had targets"
    if silent:
        text += f", {silent} were answered with nothing"
    if reported["value"] != taught / rows or reported["target_rows"] != taught or reported["rows"] != rows:
        told = f"{reported['target_rows']} of {reported['rows']}"
        return verdict_of(events, name, False, f"{text}; {told} were reported ({percent(reported['value'])})", measured)
    stops = asked.get("on_teacher_loss", "stop") == "stop"
    if taught == 0 and stops:
        return verdict_of(events, name, False, f"{text}: KD was asked for, and the teacher taught nothing", measured)
    # Across tokenizers some positions have no row, whatever becomes of the teacher; they are counted as silent.
    if taught + silent < rows and stops:
        return verdict_of(events, name, False, f"{text}, and a lost teacher was to stop the run", measured)
    return verdict_of(events, name, True, text, measured)


ALWAYS: tuple[Callable[[Events], Verdict], ...] = (
    effective_config_001,
    effective_lr_001,
    batch_rows_001,
    artefact_size_001,
    artefact_moved_001,
    kernel_nojit_001,
)
"""Judged at the end of every training run, asked for or not."""

OF_STUDENTS: tuple[Callable[[Events], Verdict], ...] = (coverage_001,)
"""Judged too at the end of a run that distils."""

REQUIRABLE: dict[str, Callable[[Events], Verdict]] = {
    "F-DISTILL-SMOKE-001": smoke_001,
    "F-DISTILL-SMOKE-002": smoke_002,
    "F-DISTILL-PIPELINE-001": pipeline_001,
    CANARY: canary_001,
    "F-EFFECTIVE-CONFIG-001": effective_config_001,
    "F-EFFECTIVE-LR-001": effective_lr_001,
    "F-BATCH-ROWS-001": batch_rows_001,
    "F-ARTEFACT-SIZE-001": artefact_size_001,
    "F-ARTEFACT-MOVED-001": artefact_moved_001,
    "F-ARTEFACT-FROZEN-001": artefact_frozen_001,
    "F-KERNEL-NOJIT-001": kernel_nojit_001,
    "F-TEACHER-COVERAGE-001": coverage_001,
    "F-LATENT-AE-001": latent_ae_001,
    "F-LATENT-AE-002": latent_ae_002,
    "F-LATENT-CAUSAL-001": latent_causal_001,
    "F-LATENT-KD-001": latent_kd_001,
    LATENT_CANARY: latent_canary_001,
}
"""What ``require`` of a section may name: each of ``latentforge.spec.fields.RUN_FALSIFIERS``."""


def judge(events: Events, require: Sequence[str] = ()) -> list[Verdict]:
    """The verdicts of a run, those that are always due first, the required ones last (a log's last lines)."""
    events = standing(events)  # a run that went back made some steps twice
    due = (*ALWAYS, *OF_STUDENTS) if (run_of(events) or "").startswith("distill-") else ALWAYS
    if ready_of(events).get("requested", {}).get("distill", {}).get("lora", {}).get("rank"):
        due = (*due, artefact_frozen_001)
    chosen = [check for check in due if all(REQUIRABLE[name] is not check for name in require)]
    return [check(events) for check in (*chosen, *(REQUIRABLE[name] for name in require))]


def _fell(events: Events, name: str) -> Verdict:
    found = heldout_metric(events, "val_loss", "student")
    if len(found) < 2 or found[0][0] != 0 or found[-1][0] == 0:
        return verdict_of(events, name, None, "val_loss at step 0 and at the end is not in the events")
    kept = kept_metric(events, "val_loss", "student")
    if kept is None:
        return verdict_of(events, name, None, "val_loss of the weights that were kept is not in the events")
    first, step, last = found[0][1], kept["step"], float(kept["value"])
    other = _other_rows(events, ("student",))
    if other is not None:
        return verdict_of(events, name, *other)
    relation = "<" if last < first else ">="
    text = f"val_loss {last:.4f} {relation} {first:.4f} at step {step}"
    measured = {"val_loss": last, "initial_val_loss": first, "step": step}
    return verdict_of(events, name, bool(last < first), text, measured)


def _other_rows(events: Events, models: Sequence[str]) -> tuple[bool | None, str] | None:
    """Why held-out values of these models do not compare, as (passed, text); None where all are of the same rows."""
    measured = [e.fields for e in events if e.kind == "metric" and e.fields.get("split") == "heldout"]
    rows = {fields.get("rows_sha256") for fields in measured if fields.get("model") in models}
    if None in rows:
        return None, "the events do not say on which held-out rows was measured"
    return (False, f"measured on {len(rows)} different sets of held-out rows") if len(rows) > 1 else None


def _unlike_twin(events: Events) -> tuple[bool | None, str] | None:
    """What besides the teacher tells student and twin apart, as (passed, text); None where it is nothing."""
    for metric in ("val_loss", "val_kl"):
        start = [found[0] for model in ("student", "twin") if (found := heldout_metric(events, metric, model))]
        if len(start) != 2 or any(step != 0 for step, _ in start):
            return None, f"{metric} of student and twin at step 0 is not in the events"
        if start[0][1] != start[1][1]:
            return False, f"student and twin started apart: {metric} {start[0][1]:.4f} and {start[1][1]:.4f} at step 0"
    student, twin = steps_of(events, "student"), steps_of(events, "twin")
    for step in sorted({*student, *twin}):
        batches = [steps.get(step, {}).get("batch_sha256") for steps in (student, twin)]
        if None in batches:
            return None, f"the events do not say what student and twin were trained on at step {step}"
        if batches[0] != batches[1]:
            return False, f"step {step}: student and twin were trained on different batches"
    return _other_rows(events, ("student", "twin"))
