"""Whether a run can have been as quick as it says: its own operations against what its device can do at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dispatch.following.losses import Remark
from latentforge.events import Event

CPU_THREAD = 400e9
"""Operations a second that no thread reaches: two 512-bit multiply-adds a cycle at 6 GHz in fp32."""
GPU = {"GB10": 500e12, "H100": 4e15, "H200": 4e15, "B200": 2e16}
ANY_DEVICE = 2e16
SMALLEST = 1e10
"""Below so many operations the clock of the events is too coarse to judge by."""


def ceiling(device: Any) -> float:
    """Operations a second that the device of an effective configuration cannot exceed; generous where unknown."""
    if isinstance(device, Mapping) and device.get("type") == "cpu" and isinstance(device.get("threads"), int):
        return CPU_THREAD * min(max(1, int(device["threads"])), 1 << 20)
    name = str(device.get("name", "")) if isinstance(device, Mapping) else ""
    return next((most for gpu, most in GPU.items() if gpu in name), ANY_DEVICE)


def too_fast(events: Sequence[Event], effective: Mapping[str, Any]) -> Remark | None:
    """Red where the steps took less time than their operations need on a device that never waits."""
    steps = [event for event in events if event.kind == "step"]
    flops = effective.get("flops")
    if not steps or not isinstance(flops, Mapping):
        return None
    models = {str(event.fields.get("model")) for event in steps}
    own = sum(_operations(value) for name, value in flops.items() if name in models)
    if own < SMALLEST:
        return None
    begins = [event.t for event in events if event.kind == "phase" and event.fields.get("name") == "ready"]
    resumed = [e.fields for e in events if e.kind == "phase" and e.fields.get("name") == "resume"]
    if resumed:
        return None  # a part of its operations was done by the run that it resumes from
    seconds = max(1e-3, steps[-1].t - (begins[-1] if begins else events[0].t))
    needed = own / ceiling(effective.get("device"))
    if seconds >= needed:
        return None
    text = (
        f"{len(steps)} steps took {seconds:.3g} s, {needed / seconds:.3g}x faster than their {own / 1e12:.3g} TFLOP "
        f"allow ({needed:.3g} s at the device's peak)"
    )
    return Remark("red", "too-fast", text)


def _operations(value: Any) -> float:
    """A count of operations as a run states it; one that is no number, or beyond all numbers, judges nothing."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e30
    return float(value) if known else 0.0


def too_slow(left: float | None, ran: float, overall: float | None) -> Remark | None:
    """A warning where the pace so far leads beyond the deadline."""
    if left is None or overall is None or ran + left <= overall:
        return None
    text = f"at this pace it ends after {(ran + left) / 3600:.3g} h, beyond its deadline of {overall / 3600:.3g} h"
    return Remark("warning", "too-slow", text)


def fewer_steps(events: Sequence[Event]) -> Remark | None:
    """Red where the last step of a model that was trained is not the last that it was to make."""
    last = {str(event.fields.get("model")): event.fields for event in events if event.kind == "step"}
    for model, fields in last.items():
        step, steps = fields.get("step"), fields.get("steps")
        if isinstance(step, int) and isinstance(steps, int) and step < steps:
            return Remark("red", "steps", f"the {model} ended at step {step} of {steps}")
    return None
