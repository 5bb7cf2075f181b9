"""What would show that a latent student learnt nothing, or saw what it was to predict: pure functions over events."""

from __future__ import annotations

import math
from typing import Any

from latentforge.train.reading import Events, heldout_metric, kept_metric, ready_of, steps_of, verdict_of
from latentforge.verdicts import Verdict

MODEL = "latent"
SIGNALS = {
    "text_weight": "val_text",
    "sample_weight": "val_sample",
    "tempered_weight": "val_tempered",
    "token_ce_weight": "val_token_ce",
    "token_kd_weight": "val_token_kd",
    "kl_weight": "val_kl",
    "mse_weight": "val_mse",
    "ce_weight": "val_ce",
}
"""The held-out loss of each signal by the weight that switches it on."""

_IN_A_STEP = {"token_ce": "ce", "token_kd": "kd", "ce": "decoded_ce", "kl": "decoded_kl"}
_ROUNDING = 1e-5
"""By how much of its parts a step's loss may be another number than their weighted sum."""


def latent_causal_001(events: Events) -> Verdict:
    """F-LATENT-CAUSAL-001: on held-out text, another chunk changes nothing before it, and something after it."""
    name = "F-LATENT-CAUSAL-001"
    found = kept_metric(events, "change_before_a_chunk", MODEL)
    if found is None:
        return verdict_of(
            events, name, None, "change_before_a_chunk of the weights that were kept is not in the events"
        )
    before, after, places = float(found["value"]), float(found["after"]), found["places"]
    measured = {"before": before, "after": after, "places": places}
    if not after > 0:
        text = f"another chunk changes nothing at all ({places} places): whether the student is causal does not show"
        return verdict_of(events, name, None, text, measured)
    text = f"another chunk at {places} places changes what comes before by {before:.3g}, what follows by {after:.3g}"
    return verdict_of(events, name, before == 0.0, text, measured)


def latent_kd_001(events: Events) -> Verdict:
    """F-LATENT-KD-001: the held-out loss of each signal that is switched on is lower of the saved weights than before
    step 1, and each step's loss was the sum of its signals by the weights that were asked for: what one of them teaches
    may lower the loss of another, which itself was left out."""
    name = "F-LATENT-KD-001"
    weights = switched_on(events)
    wanted = [f"val_{part}" for part in weights]
    missing = left_out(events, weights)
    if missing is not None:
        return verdict_of(events, name, *missing)
    other = _other_rows(events, wanted)
    if other is not None:
        return verdict_of(events, name, *other)
    measured: dict[str, Any] = {}
    rose, told = [], []
    for metric in wanted:
        found, kept = heldout_metric(events, metric, MODEL), kept_metric(events, metric, MODEL)
        if not found or found[0][0] != 0 or kept is None or kept["step"] == 0:
            said = f"{metric} before step 1 and of the weights that were kept is not in the events"
            return verdict_of(events, name, None, said)
        first, last = found[0][1], float(kept["value"])
        measured[metric] = [first, last]
        fell = math.isfinite(first) and math.isfinite(last) and last < first
        told.append(f"{metric.removeprefix('val_')} {first:.4f} {'>' if fell else '<='} {last:.4f}")
        rose += [] if fell else [metric]
    if not wanted:
        return verdict_of(events, name, None, "no signal is in the events")
    return verdict_of(events, name, not rose, f"held out, before and after: {', '.join(told)}", measured)


def switched_on(events: Events) -> dict[str, float]:
    """The weight in a step's loss of each signal that has one: those below T = 1 share theirs, and are judged each by
    itself, since their mean could hide one that rose."""
    asked = ready_of(events).get("requested", {}).get(MODEL, {})
    found = {metric.removeprefix("val_"): float(asked.get(weight, 0)) for weight, metric in SIGNALS.items()}
    seen = {name for fields in steps_of(events, MODEL).values() for name in fields}
    below = sorted({name.removesuffix("_chunks") for name in seen if name.startswith("tempered_")})
    if below:
        share = found.pop("tempered") / len(below)
        found |= dict.fromkeys(below, share)
    return {part: share for part, share in found.items() if share > 0}


def left_out(events: Events, weights: dict[str, float]) -> tuple[bool | None, str] | None:
    """Which signal was not in the loss of the steps with its weight, as (passed, text); None where all were."""
    steps = steps_of(events, MODEL)
    if not steps:
        return None, "no step is in the events"
    said = {
        step: {part: fields.get(_IN_A_STEP.get(part, part)) for part in weights} | {"loss": fields.get("loss")}
        for step, fields in steps.items()
    }
    never = [part for part in weights if all(parts[part] is None for parts in said.values())]
    if never:
        return False, f"{', '.join(never)}: in the loss of no step"
    for step, parts in said.items():
        shares = [weights[part] * float(value) for part, value in parts.items() if part != "loss" and value is not None]
        loss = float("nan") if parts["loss"] is None else float(parts["loss"])
        if not abs(loss - sum(shares)) <= _ROUNDING * max(1.0, sum(map(abs, shares))):
            told = " + ".join(f"{weights[part]:g} {part}" for part in weights if parts[part] is not None)
            return False, f"step {step}: the loss {loss:.6g} is not {told} = {sum(shares):.6g}"
    return None


def _other_rows(events: Events, metrics: list[str]) -> tuple[bool | None, str] | None:
    """Why the held-out values do not compare, as (passed, text); None where all are of the same rows."""
    said = [e.fields for e in events if e.kind == "metric" and e.fields.get("name") in metrics]
    rows = {fields.get("rows_sha256") for fields in said if fields.get("model") == MODEL}
    if None in rows:
        return None, "the events do not say on which held-out rows was measured"
    return (False, f"measured on {len(rows)} different sets of held-out rows") if len(rows) > 1 else None
