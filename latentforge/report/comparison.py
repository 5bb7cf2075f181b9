"""Several runs beside one another: their figures, their curves in one picture, the settings that differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from latentforge.evidence.configuration import same
from latentforge.evidence.reading import RunRecord, Series
from latentforge.report import glance
from latentforge.report.chart import Chart, Mark, colour
from latentforge.report.glance import Figure
from latentforge.report.panels import CROSS_ENTROPY, KL, of_model, points
from latentforge.report.telling import state

_DIGITS = 4
"""Digits of a run's id that name it in a legend, beside its kind; more where two begin alike."""
_MODEL = {"distill": "student", "latent": "latent"}


@dataclass(frozen=True)
class Row:
    """One run of a comparison; ``colour`` is its marks' in the pictures."""

    id: str
    name: str
    colour: str
    state: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Field:
    """A setting whose value is not the same in all runs, with each run's value in order, None where it has none."""

    name: str
    values: tuple[str | None, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side."""

    rows: tuple[Row, ...]
    charts: tuple[Chart, ...]
    fields: tuple[Field, ...]
    notes: tuple[str, ...]


def compare(records: Sequence[RunRecord]) -> Comparison:
    """The comparison of two or more runs. Held-out values that were measured on different rows are named as such."""
    names = short_names(records)
    rows = tuple(
        Row(record.id, name, colour(number), state(record), tuple(glance.figures(record)))
        for number, (record, name) in enumerate(zip(records, names, strict=True))
    )
    charts = [
        _curves(records, names, "cross-entropy", "Cross-entropy", "nats a token", "ce", CROSS_ENTROPY),
        _curves(records, names, "kl", "KL to the teacher", "nats a token", "kd", KL),
        _curves(records, names, "throughput", "Throughput", "tokens/s", "tokens_per_second", {}),
        _against_compute(records, names),
    ]
    drawn = tuple(chart for chart in charts if chart is not None)
    return Comparison(rows, drawn, tuple(_fields(records)), tuple(_notes(records, names)))


def short_names(records: Sequence[RunRecord]) -> list[str]:
    """Each run's kind and as many digits of its id as tell all apart, which no two have in common."""
    digits = _DIGITS
    while True:
        names = [f"{record.kind}-{record.id.partition('-')[2][:digits]}" for record in records]
        if len(set(names)) == len(names):
            return names
        digits += 1


def primary(record: RunRecord) -> str:
    """The model that a run is about."""
    return _MODEL.get(record.kind, record.kind)


def _curves(
    records: Sequence[RunRecord],
    names: Sequence[str],
    name: str,
    title: str,
    unit: str,
    field: str,
    metrics: dict[str, str],
) -> Chart | None:
    marks: list[Mark] = []
    for number, (record, told) in enumerate(zip(records, names, strict=True)):
        series = [one for one in of_model(record, field) if one.model == primary(record)]
        marks += [Mark(told, colour(number), points(one), smooth=True) for one in series]
    for number, (record, told) in enumerate(zip(records, names, strict=True)):
        held = _held_out(record, metrics.get(record.kind))
        if held is not None:
            marks.append(Mark(f"{told}, held-out", colour(number), points(held), dots=True))
    if len({mark.who for mark in marks}) < 2:
        return None  # nothing to compare
    return Chart(name, title, unit, tuple(marks), zero=field == "tokens_per_second")


def _against_compute(records: Sequence[RunRecord], names: Sequence[str]) -> Chart | None:
    """Held-out loss by the operations of training: only where all is known to be of the same rows."""
    marks = []
    rows = {_rows(record) for record in records}
    if len(rows) != 1 or None in rows:
        return None
    for number, (record, told) in enumerate(zip(records, names, strict=True)):
        held = _held_out(record, CROSS_ENTROPY.get(record.kind))
        spent = record.flops.get(primary(record)) if isinstance(record.flops, dict) else None
        if held is not None and held.kept is not None and isinstance(spent, int | float):
            marks.append(Mark(told, colour(number), ((float(spent), held.kept[1]),), dots=True))
    if len(marks) < 2:
        return None
    across = "operations of training"
    return Chart("compute", "Quality against compute", "held-out, nats a token", tuple(marks), across, steps=False)


def _fields(records: Sequence[RunRecord]) -> list[Field]:
    told = [record.effective if record.effective is not None else record.requested or {} for record in records]
    names = sorted({name for values in told for name in values})
    return [
        Field(name, tuple(_value(values, name) for values in told))
        for name in names
        if not all(name in values and same(values[name], told[0].get(name)) for values in told)
    ]


def _notes(records: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    notes = []
    rows: dict[str | None, list[str]] = {}
    for record, name in zip(records, names, strict=True):
        if _held_out(record, CROSS_ENTROPY.get(record.kind)) is not None:
            rows.setdefault(_rows(record), []).append(name)
    unknown = rows.pop(None, [])
    if len(rows) > 1:
        groups = "; ".join(", ".join(group) for group in rows.values())
        notes.append(f"held-out values compare only within a group, which was measured on the same rows: {groups}")
    if unknown:
        notes.append(
            f"the held-out rows of {', '.join(unknown)} are not known: no other's held-out values compare with theirs"
        )
    if len({record.kind for record in records}) > 1:
        notes.append("runs of different kinds: their losses are not the same thing")
    unstated = [name for record, name in zip(records, names, strict=True) if record.effective is None]
    if unstated:
        notes.append(f"of {', '.join(unstated)} only what was asked for is known, not what was in force")
    return notes


def _held_out(record: RunRecord, metric: str | None) -> Series | None:
    return record.metric(metric, model=primary(record), split="heldout") if metric is not None else None


def _rows(record: RunRecord) -> str | None:
    """The digest of the rows that the held-out loss was measured on; None where the run does not say, or names two."""
    metric, model = CROSS_ENTROPY.get(record.kind), primary(record)
    told = {
        str(event.fields.get("rows_sha256") or "")
        for event in record.events
        if event.kind == "metric"
        and (event.fields.get("name"), event.fields.get("model")) == (metric, model)
        and event.fields.get("split") == "heldout"
    }
    return (told.pop() or None) if len(told) == 1 else None


def _value(values: dict[str, Any], name: str) -> str | None:
    if name not in values:
        return None
    value = values[name]
    return value if isinstance(value, str) else "–" if value is None else json.dumps(value, ensure_ascii=False)
