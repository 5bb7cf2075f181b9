"""A run at a glance: the handful of figures that stand above the charts, and its phases in time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from latentforge.evidence.reading import RunRecord, as_number
from latentforge.report.axes import drawable
from latentforge.report.panels import of_model
from latentforge.report.words import duration, is_number, number, once, size, worded


@dataclass(frozen=True)
class Figure:
    """A figure with its name, and what it is to be seen beside."""

    name: str
    value: str
    beside: str = ""


@dataclass(frozen=True)
class Bar:
    """A phase as a bar: where it begins and how long it is in percent of the run; ``open_`` where it never ended."""

    name: str
    begin: float
    length: float
    told: str
    open_: bool


def figures(record: RunRecord) -> list[Figure]:
    """Time, speed, memory, teacher coverage and compute, as far as the run states them."""
    found = [_held_out(record, "val_loss", "held-out loss"), _held_out(record, "val_kl", "held-out KL")]
    found += [_time(record), _speed(record), _memory(record), _coverage(record), _compute(record)]
    return [one for one in found if one is not None]


def timeline(record: RunRecord) -> list[Bar]:
    """The phases of a run from its first event to its last; what never ended reaches to the last event."""
    if not record.events or not record.phases:
        return []
    begin, end = record.events[0].t, record.events[-1].t
    whole = max(end - begin, 1e-9)
    if not drawable(whole):
        return []
    bars = []
    for phase in record.phases:
        seconds = phase.seconds if phase.seconds is not None else end - phase.began
        seconds = seconds if drawable(seconds) and seconds >= 0 else 0.0
        left = min(100.0, max(0.0, 100 * (phase.began - begin) / whole))
        told = duration(seconds) if phase.seconds is not None else f"{duration(seconds)}, not ended"
        bars.append(Bar(phase.name, left, min(100 - left, 100 * seconds / whole), told, phase.seconds is None))
    return bars


def compiles(record: RunRecord) -> list[str]:
    """What was compiled after set-up, a line each; what a trainer counted without an event of its own too."""
    lines = []
    for event in record.events:
        if event.kind == "compile":
            said = event.fields
            what = ", ".join(map(str, told)) if isinstance(told := said.get("what"), list) and told else "not named"
            lines.append(f"{said.get('compiler')}: {said.get('count')} by step {said.get('step')}: {what}")
    return lines


def compile_line(record: RunRecord) -> str | None:
    """Whether anything was compiled while it trained; None where no step counted."""
    counted = [value for one in of_model(record, "compiles") for value in one.values]
    named = [event for event in record.events if event.kind == "compile"]
    if not counted and not named:
        return None
    total = sum(_whole(event.fields.get("count")) for event in named) or sum(map(_whole, counted))
    return f"{once(total, 'compile')} after set-up, {once(len(counted), 'step')}"


def checkpoints(record: RunRecord) -> list[str]:
    """The checkpoints that were written, a line each."""
    lines = []
    for event in record.events:
        said = event.fields
        if event.kind == "checkpoint":
            moved = f", {said['moved']} of {said['tensors']} tensors moved" if {"moved", "tensors"} <= set(said) else ""
            wide = size(said["bytes"]) if is_number(said.get("bytes")) else "size not told"
            lines.append(f"checkpoint, step {said.get('step')}: {said.get('path')}, {wide}{moved}")
    return lines


def wall(record: RunRecord) -> float | None:
    """Seconds from the first event to the last; None without events."""
    return record.events[-1].t - record.events[0].t if record.events else None


def coverage(record: RunRecord) -> dict[str, Any] | None:
    """What the trainer counted of its teacher: the fields of its last ``kd_coverage`` event."""
    told = [
        event.fields for event in record.events if event.kind == "metric" and event.fields.get("name") == "kd_coverage"
    ]
    return told[-1] if told else None


def teacher(record: RunRecord) -> list[tuple[str, str]]:
    """What the run counted of its teacher, the last time that it did: rows with targets, requests, retries, hits."""
    found: dict[str, Any] = {}
    for event in record.events:
        said = event.fields
        if event.kind == "metric" and said.get("name") == "kd_coverage":
            found |= {name: value for name, value in said.items() if name not in _NO_COUNT}
        elif event.kind == "metric" and said.get("name") == "teacher":
            found |= {name.removeprefix("teacher_"): v for name, v in said.items() if name.startswith("teacher_")}
    return [
        (name.replace("_", " "), worded(value))
        for name, value in found.items()
        if value is not None and not isinstance(value, dict | list)
    ]


_NO_COUNT = frozenset({"name", "value", "step", "split", "model"})


def _held_out(record: RunRecord, name: str, title: str) -> Figure | None:
    model = {"distill": "student", "latent": "latent"}.get(record.kind, record.kind)
    series = record.metric(name, model=model, split="heldout")
    if series is None or series.kept is None:
        return None
    step, value = series.kept
    twin = record.metric(name, model="twin", split="heldout")
    beside = f"from {number(series.values[0])}" if len(series.values) > 1 else f"at step {number(step)}"
    beside += f"; of step {number(step)}, which is kept" if step != series.steps[-1] else ""
    beside += f"; twin {number(twin.kept[1])}" if twin and twin.kept else ""
    return Figure(title, number(value), beside)


def _time(record: RunRecord) -> Figure | None:
    seconds = wall(record)
    if seconds is None:
        return None
    trained = (record.timings or {}).get("train")
    return Figure(
        "time", duration(seconds), f"training {duration(trained)}" if trained is not None else "first to last event"
    )


def _speed(record: RunRecord) -> Figure | None:
    series = of_model(record, "tokens_per_second")
    if not series:
        return None
    chosen = next((one for one in series if one.model != "twin"), series[0])
    finite = [value for value in chosen.values if drawable(value)]
    median = number(round(statistics.median(finite))) if finite else "not a number"
    steps = max((_whole(event.fields.get("steps")) for event in record.events if event.kind == "step"), default=0)
    done = f"{once(len(chosen.values), 'step')}" + (f" of {number(steps)}" if steps != len(chosen.values) else "")
    done += f", {number(len(finite))} of them finite" if len(finite) != len(chosen.values) else ""
    return Figure("tokens/s, median", median, done)


def _memory(record: RunRecord) -> Figure | None:
    """The peak that the plan counts, beside the plan; what else was resident after it."""
    planned, measured, resident = (_last(record, f"{name}_bytes") for name in ("planned", "measured", "resident"))
    if measured is None or not planned:
        peak, beside = record.peak_memory_bytes, f"of {size(planned)} planned" if planned else ""
        return Figure("peak memory", size(peak), beside) if peak is not None else None
    beside = f"{number(round(100 * measured / planned))} % of {size(planned)} planned"
    return Figure("peak memory", size(measured), beside + (f"; {size(resident)} resident" if resident else ""))


def _coverage(record: RunRecord) -> Figure | None:
    told = coverage(record)
    share = as_number(told.get("value")) if told is not None else None
    if told is None or share is None:
        return None
    beside = f"{worded(told.get('target_rows'))} of {worded(told.get('rows'))} rows" if "rows" in told else ""
    return Figure("teacher coverage", f"{100 * share:.4g} %" if math.isfinite(share) else number(share), beside)


def _compute(record: RunRecord) -> Figure | None:
    if not isinstance(record.flops, dict):
        return None
    parts = {name: value for name, value in record.flops.items() if is_number(value)}
    if not parts:
        return None
    return Figure(
        "compute", flops(sum(parts.values())), ", ".join(f"{name} {flops(value)}" for name, value in parts.items())
    )


def flops(value: float) -> str:
    """Operations for people: ``0.80 TFLOP``."""
    for least, unit in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if value >= 0.1 * least:
            return f"{value / least:.3g} {unit}"
    return f"{number(value)} FLOP"


def _whole(value: Any) -> int:
    """A count of an event; 0 for what is none."""
    found = as_number(value)
    return int(found) if found is not None and drawable(found) else 0


def _last(record: RunRecord, field: str) -> float | None:
    values: Iterable[Any] = (event.fields.get(field) for event in record.events if event.kind == "memory")
    return next((value for value in reversed(list(values)) if is_number(value)), None)
