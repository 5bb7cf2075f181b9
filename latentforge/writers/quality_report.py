"""The report of ``latentforge bench quality``: students beside each other, at what cost, and what one may conclude."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latentforge.students.latent.bootstrap import Interval
from latentforge.writers.quality import Quality, Report
from latentforge.writers.quality_cost import Equal, compared
from latentforge.writers.rollout import binned


def equal_compute(report: Report) -> Equal | None:
    """How the first latent student's inference cost compares with that of the first token-level one; None where there
    is no latent student, or one of the two is not counted."""
    students = [one for one in report.models if one.name != "teacher"]
    latent = next((one for one in students if one.writer.kind == "latent"), None)
    token = next((one for one in students if one.writer.kind == "token"), None)
    if latent is None:
        return None
    return compared(
        latent.writer,
        latent.cost,
        None if token is None else token.writer,
        None if token is None else token.cost,
        positions=report.positions,
    )


def as_json(report: Report) -> dict[str, Any]:
    """The report as data, the comparison of costs included."""
    equal = equal_compute(report)
    return {**report.as_json(), "equal_compute": None if equal is None else equal.as_json()}


def lines(report: Report) -> list[str]:
    """The report for people."""
    asked = report.protocol
    head = (
        f"{asked.rows} held-out rows of {report.positions} tokens, {report.contexts} contexts, {asked.draws} draws "
        f"each; intervals of 95 % by rows"
    )
    return [head, "", *_models(report.models), "", *_costs(report), *_rollout(report)]


def _models(models: Sequence[Quality]) -> list[str]:
    rows = [["", "parameters", "op/token", "draws/chunk", "training op", "BrierLM", "bits/byte", "from teacher, %"]]
    for one in models:
        inference, training = one.cost.inference, one.cost.training
        rows.append(
            [
                one.name,
                f"{one.writer.parameters:,}",
                "–" if inference is None else f"{inference:.3g}",
                f"{one.cost.draws:.1f}" if one.writer.kind == "latent" else "–",
                "–" if training is None else f"{training:.3g}",
                _figure(one.brier_lm, 2),
                "–" if one.bits_per_byte is None else _figure(one.bits_per_byte, 3),
                "–" if one.agreement is None else _figure(one.agreement, 1),
            ]
        )
    return _table(rows)


def _costs(report: Report) -> list[str]:
    equal = equal_compute(report)
    if equal is None:
        return []
    found = []
    if equal.difference is not None:
        verdict = "equal" if equal.holds else "NOT equal: the qualities above do not compare"
        found.append(f"inference of the token-level student costs {equal.difference:+.1%}: {verdict} (within 5 %)")
    if not equal.holds and equal.matched is not None:
        shape = equal.matched.shape
        size = ", ".join(f"{name} = {value}" for name, value in vars(shape).items())
        found.append(f"one that costs as much ({equal.matched.difference:+.1%}):  distill.student = {{ {size} }}")
    return [*found, ""] if found else []


def _rollout(report: Report) -> list[str]:
    if not report.real:
        return []
    columns = [("real text", report.real), *((one.name, one.rollout) for one in report.models)]
    by_name = {name: {one.chunk: one for one in binned(found)} for name, found in columns}
    every = sorted({chunk for found in by_name.values() for chunk in found})
    rows = [["chunk", *by_name]]
    for at, chunk in enumerate(every):
        last = every[at + 1] - 1 if at + 1 < len(every) else report.protocol.chunks - 1
        name = str(chunk) if last <= chunk else f"{chunk}–{last}"
        told = [found.get(chunk) for found in by_name.values()]
        rows.append([name, *("–" if one is None else f"{one.bits:.2f} ({one.texts})" for one in told)])
    title = (
        f"teacher's bits a token of what was written after prompts of {report.protocol.prompt} chunks, by its place "
        "(texts that went so far); nearest to the teacher's own is best, lower is text that repeats itself"
    )
    return [title, *_table(rows)]


def _figure(found: Interval | Any, digits: int) -> str:
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
