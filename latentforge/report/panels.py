"""Which charts a run has: what its trainer stated, step by step and on held-out rows."""

from __future__ import annotations

import math

from latentforge.evidence.reading import RunRecord, Series
from latentforge.report.chart import Chart, Mark

_CROSS_ENTROPY = {"distill": "val_loss", "teacher": "val_loss", "autoencoder": "val_loss", "latent": "val_token_ce"}
_KL = {"distill": "val_kl", "latent": "val_token_kd"}
_WHAT_LOSS_IS = {
    "distill": "ce_weight x cross-entropy + kd_weight x KL; the twin has no KL",
    "latent": "the energy score of the latents, and what is added to it",
    "autoencoder": "a chunk's tokens together, and the latents' KL",
}


def learning(record: RunRecord) -> list[Chart]:
    """Loss and KL against steps, held-out values marked; the charts that come first."""
    charts = [
        _beside(record, "cross-entropy", "Cross-entropy", "nats a token", "ce", _CROSS_ENTROPY.get(record.kind)),
        _beside(record, "kl", "KL to the teacher", "nats a token", "kd", _KL.get(record.kind)),
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
    shown = {_CROSS_ENTROPY.get(record.kind), _KL.get(record.kind)}
    held = [
        one for one in record.metrics if one.split == "heldout" and one.name not in shown and len(set(one.steps)) > 1
    ]
    shares = [one for one in held if "accuracy" in one.name]
    terms = [one for one in held if one.name.startswith("val_")]
    charts = []
    for name, title, unit, chosen in (
        ("accuracy", "Held-out accuracy", "share that came back", shares),
        ("terms", "Held-out terms of the loss", "as measured", terms),
    ):
        marks = [
            Mark(one.name.removeprefix("val_"), f"run{number}", _last_of_each_step(one), dots=False)
            for number, one in enumerate(chosen[:6])
        ]
        if marks:
            charts.append(Chart(name, title, unit, tuple(marks)))
    return charts


def _last_of_each_step(series: Series) -> tuple[tuple[float, float], ...]:
    """One point a step: a value told for several levels of noise is drawn for the last of them alone."""
    return tuple((float(step), value) for step, value in dict(zip(series.steps, series.values, strict=True)).items())


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
