"""Which charts a run has: what its trainer stated, step by step and on held-out rows."""

from __future__ import annotations

import math

from latentforge.events import in_course
from latentforge.evidence.reading import RunRecord, Series, as_number
from latentforge.report.chart import COLOURS, Chart, Mark, colour
from latentforge.report.words import number

# The held-out metric of each kind of run that is measured as its steps' cross-entropy, and as their KL.
CROSS_ENTROPY = {"distill": "val_loss", "teacher": "val_loss", "autoencoder": "val_loss", "latent": "val_token_ce"}
KL = {"distill": "val_kl", "latent": "val_token_kd"}
_WHAT_LOSS_IS = {
    "distill": "ce_weight x cross-entropy + kd_weight x KL; the twin has no KL",
    "latent": "the energy score of the latents, and what is added to it",
    "autoencoder": "a chunk's tokens together, and the latents' KL",
}


def learning(record: RunRecord) -> list[Chart]:
    """Loss and KL against steps, held-out values marked; the charts that come first."""
    charts = [
        _beside(record, "cross-entropy", "Cross-entropy", "nats a token", "ce", CROSS_ENTROPY.get(record.kind)),
        _beside(record, "kl", "KL to the teacher", "nats a token", "kd", KL.get(record.kind)),
        _beside(record, "loss", "Loss", "as minimised", "loss", None, _WHAT_LOSS_IS.get(record.kind)),
        *_other_metrics(record),
    ]
    return [chart for chart in charts if chart is not None]


def working(record: RunRecord) -> list[Chart]:
    """How fast and in how much memory it ran, and what the optimiser was given."""
    charts = [
        _of_steps(record, "throughput", "Throughput", "tokens/s", "tokens_per_second", zero=True, smooth=True),
        _of_steps(record, "memory", "Memory", "resident or allocated", "memory_bytes", bytes_=True, levels=True),
        _of_steps(record, "learning-rate", "Learning rate", "in force", "learning_rate", zero=True),
        _of_steps(record, "grad-norm", "Gradient norm", "before clipping", "grad_norm", smooth=True),
        _supply(record),
        _covered(record),
    ]
    return [chart for chart in charts if chart is not None]


def of_model(record: RunRecord, name: str) -> list[Series]:
    """The series of the steps by that name, one a model."""
    return [series for series in record.trained if series.name == name]


def points(series: Series) -> tuple[tuple[float, float], ...]:
    """A series as points of a chart."""
    return tuple(zip(map(float, series.steps), series.values, strict=True))


def _beside(
    record: RunRecord, name: str, title: str, unit: str, field: str, metric: str | None, note: str | None = None
) -> Chart | None:
    lines = [Mark(f"{one.model}", one.model or "", points(one), smooth=True) for one in of_model(record, field)]
    held = [
        Mark(f"{one.model}, held-out", one.model or "", points(one), dots=True)
        for one in record.metrics
        if one.name == metric and one.split == "heldout"
    ]
    # One model's loss is its cross-entropy where it has no other term: one picture of it is enough.
    if field == "loss" and all(_same(record, one, "ce") for one in of_model(record, "loss")):
        return None
    return Chart(name, title, unit, (*lines, *held), note=note) if lines or held else None


def _same(record: RunRecord, loss: Series, field: str) -> bool:
    other = [one for one in of_model(record, field) if one.model == loss.model]
    return bool(other) and all(
        math.isclose(a, b, rel_tol=1e-6) for a, b in zip(loss.values, other[0].values, strict=False)
    )


def _other_metrics(record: RunRecord) -> list[Chart]:
    """Held-out values that no other chart shows: shares of a codec, terms of a latent student's loss."""
    shown = {CROSS_ENTROPY.get(record.kind), KL.get(record.kind)}
    told: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for event in record.events:
        said = event.fields
        held_out = event.kind == "metric" and said.get("split") == "heldout" and in_course(event)
        if held_out and str(said.get("name")) not in shown:
            noise = f" at noise {said['noise']}" if "noise" in said else ""
            name, step, value = f"{said.get('name')}{noise}", said.get("step"), as_number(said.get("value"))
            if isinstance(step, int) and value is not None:
                told.setdefault((str(said.get("model")), name), []).append((float(step), value))
    models = {model for model, _ in told}
    held = {
        name if len(models) == 1 else f"{model}, {name}": tuple(found)
        for (model, name), found in told.items()
        if len({step for step, _ in found}) > 1
    }
    charts = []
    for name, title, unit, word in (
        ("accuracy", "Held-out accuracy", "share that came back", "accuracy"),
        ("terms", "Held-out terms of the loss", "as measured", "val_"),
    ):
        chosen = [(one, found) for one, found in held.items() if word in one]
        if chosen:
            marks = [
                Mark(one.replace("val_", "").replace("_", " "), colour(place), found, dots=True)
                for place, (one, found) in enumerate(chosen[:COLOURS])
            ]
            more = [one for one, _ in chosen[COLOURS:]]
            note = f"{number(len(more))} more are not drawn, {more[0]} the first of them" if more else None
            charts.append(Chart(name, title, unit, tuple(marks), note=note))
    return charts


def _of_steps(
    record: RunRecord,
    name: str,
    title: str,
    unit: str,
    field: str,
    *,
    zero: bool = False,
    smooth: bool = False,
    levels: bool = False,
    bytes_: bool = False,
) -> Chart | None:
    marks = tuple(
        Mark(str(one.model), one.model or "", points(one), smooth=smooth, levels=levels)
        for one in of_model(record, field)
    )
    return Chart(name, title, unit, marks, zero=zero, bytes=bytes_) if marks else None


def _supply(record: RunRecord) -> Chart | None:
    """How long each step waited for the teacher, beside how long its answer took."""
    marks = []
    for field, name in (("target_seconds", "fetched in"), ("target_wait_seconds", "waited for")):
        for one in of_model(record, field):
            in_ms = tuple((x, 1e3 * y) for x, y in points(one))
            marks.append(Mark(name, "teacher" if field == "target_seconds" else str(one.model), in_ms, smooth=True))
    return Chart("teacher-wait", "Teacher's targets", "ms a step", tuple(marks), zero=True) if marks else None


def _covered(record: RunRecord) -> Chart | None:
    """The share of a step's rows that the teacher had targets for; no chart where all of them had."""
    marks = []
    for rows in of_model(record, "rows"):
        taught = [one for one in of_model(record, "kd_rows") if one.model == rows.model]
        if taught and len(taught[0].values) == len(rows.values):
            shares = zip(rows.steps, taught[0].values, rows.values, strict=True)
            found = tuple((float(step), had / of if of else float("nan")) for step, had, of in shares)
            if any(share != 1.0 for _, share in found):
                marks.append(Mark(str(rows.model), rows.model or "", found, smooth=True))
    return Chart("coverage", "Teacher coverage", "share of rows", tuple(marks), zero=True) if marks else None
