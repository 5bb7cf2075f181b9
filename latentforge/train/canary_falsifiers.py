"""What would show that a long run is not worth its hours, by the first steps that its canary made: over events."""

from __future__ import annotations

import math
from typing import Any

from latentforge.spec.canary import CANARY, LATENT_CANARY
from latentforge.train.latent_falsifiers import MODEL, left_out, switched_on
from latentforge.train.reading import Events, heldout_metric, steps_of, verdict_of
from latentforge.verdicts import Verdict

SAME = 1e-6
"""A loss before step 1 that is no larger (nats a token, or an energy score) teaches nothing: the answers are the same
already, since two fp32 passes differ by less."""

_Against = tuple[bool | None, str] | None


def canary_001(events: Events) -> Verdict:
    """F-DISTILL-CANARY-001: a checkpoint before the last step is whole and every tensor in it moved; the teacher has
    something to teach at step 0, so held-out KL and the first step's KD term are above what rounding leaves.
    """
    one = _early_checkpoint(events, "student")
    start, first = heldout_metric(events, "val_kl", "student"), steps_of(events, "student").get(1, {})
    if one is None or not start or start[0][0] != 0 or "kd" not in first:
        missing = "a checkpoint before the last step" if one is None else "KL to the teacher at step 0"
        return verdict_of(events, CANARY, None, f"{missing} is not in the events")
    kl, kd = start[0][1], first["kd"]
    measured = {**_weighed(one), "val_kl": kl, "kd": kd}
    against = _damaged(one)
    # Without KD in the objective there is no such term; the distance to the teacher is measured all the same.
    if against is None and not (_teaches(kl) and (kd is None or _teaches(kd))):
        against = False, f"KD term {'none' if kd is None else f'{kd:.2e}'}, held-out KL {kl:.2e} at step 0"
    return verdict_of(events, CANARY, *(against or (True, f"{_whole(one)}, KL {kl:.3f}")), measured)


def latent_canary_001(events: Events) -> Verdict:
    """F-LATENT-CANARY-001: a checkpoint before the last step is whole and every tensor in it moved; each signal that is
    switched on was in the loss of the steps by its weight, and has something to teach: its held-out loss before step 1
    is above what rounding leaves.
    """
    one, weights = _early_checkpoint(events, MODEL), switched_on(events)
    if one is None or not weights:
        missing = "a checkpoint before the last step" if one is None else "a signal that is switched on"
        return verdict_of(events, LATENT_CANARY, None, f"{missing} is not in the events")
    start: dict[str, float] = {}
    for part in weights:
        found = heldout_metric(events, f"val_{part}", MODEL)
        if not found or found[0][0] != 0:
            return verdict_of(events, LATENT_CANARY, None, f"val_{part} before step 1 is not in the events")
        start[part] = found[0][1]
    measured = {**_weighed(one), **{f"val_{part}": value for part, value in start.items()}}
    against = _never_came(events, weights) or _damaged(one) or left_out(events, weights) or _silent(start)
    passed = True, f"{_whole(one)}; before step 1 {', '.join(f'{part} {value:.4g}' for part, value in start.items())}"
    return verdict_of(events, LATENT_CANARY, *(against or passed), measured)


def _early_checkpoint(events: Events, model: str) -> dict[str, Any] | None:
    """The first checkpoint before the last step of ``model``."""
    last = max(steps_of(events, model), default=0)
    early = (e.fields for e in events if e.kind == "checkpoint" and 0 < e.fields["step"] < last)
    return next(early, None)


def _weighed(one: dict[str, Any]) -> dict[str, Any]:
    fields = ("bytes", "expected_bytes", "moved", "tensors")
    return {"checkpoint_step": one["step"], **{field: one[field] for field in fields}}


def _whole(one: dict[str, Any]) -> str:
    return f"checkpoint of step {one['step']} whole, {one['moved']} of {one['tensors']} tensors moved"


def _damaged(one: dict[str, Any]) -> _Against:
    if not one["bytes"] >= one["expected_bytes"] > 0:
        return (
            False,
            f"checkpoint of step {one['step']} has {one['bytes']} bytes, its tensors need {one['expected_bytes']}",
        )
    if not one["moved"] == one["tensors"] > 0:
        names = ", ".join(one.get("unmoved", [])[:3])
        unmoved = f"; unmoved: {names}" if names else ""
        return False, f"{one['moved']} of {one['tensors']} tensors moved by step {one['step']}{unmoved}"
    return None


def _never_came(events: Events, weights: dict[str, float]) -> _Against:
    """Signals of which the few batches held no chunk: of a text that is continued in part, that can be chance."""
    steps = steps_of(events, MODEL).values()
    never = [part for part in weights if all(fields.get(f"{part}_chunks") == 0 for fields in steps)]
    if not never:
        return None
    return None, f"{', '.join(never)}: no row that was continued came in {len(steps)} steps; continue more of them"


def _silent(start: dict[str, float]) -> _Against:
    told = ", ".join(f"{part} {value:.2e}" for part, value in start.items() if not _teaches(value))
    return (False, f"nothing to teach before step 1: held-out {told}") if told else None


def _teaches(value: float) -> bool:
    return SAME < value < math.inf
