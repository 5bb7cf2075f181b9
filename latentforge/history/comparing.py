"""Several runs side by side: what was asked of them, what they were judged, what came out, what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentforge.errors import RefusedError
from latentforge.evidence.configuration import flatten, same
from latentforge.evidence.reading import RunRecord

ABSENT = "–"


@dataclass(frozen=True)
class Line:
    """One thing of every run, in the order of the runs; ``ABSENT`` where a run has it not."""

    subject: str
    name: str
    values: tuple[Any, ...]

    @property
    def differs(self) -> bool:
        """Whether any two runs have it otherwise."""
        return not all(one is self.values[0] or same(one, self.values[0]) for one in self.values[1:])


def compare(runs: Sequence[RunRecord]) -> list[Line]:
    """Every line of two or more runs, subject by subject; the same run twice is refused."""
    if len(runs) < 2:
        raise RefusedError("one run is compared with nothing", next="latentforge runs compare RUN RUN")
    folders = [run.folder for run in runs]
    twice = next((one for one in folders if folders.count(one) > 1), None)
    if twice is not None:
        raise RefusedError(f"{twice.name} is compared with itself")
    pictures = [picture(run) for run in runs]
    lines = []
    for subject in pictures[0]:
        names = dict.fromkeys(name for one in pictures for name in one[subject])
        lines += [Line(subject, name, tuple(one[subject].get(name, ABSENT) for one in pictures)) for name in names]
    return lines


def picture(run: RunRecord) -> dict[str, Mapping[str, Any]]:
    """What is compared of a run, by subject, flat."""
    results: dict[str, Any] = {}
    for series in run.metrics:
        if series.split == "heldout" and series.kept is not None:
            name = series.name if series.model is None else f"{series.model} {series.name}"
            results[name] = series.kept[1]
            if series.kept[0] != series.steps[-1]:
                results[f"{name}, of step"] = series.kept[0]
    rows = {
        str(event.fields.get("rows_sha256"))
        for event in run.events
        if event.kind == "metric" and event.fields.get("split") == "heldout"
    }
    if results:  # values of other rows, or of rows that nobody knows, do not compare
        results["rows (sha256)"] = ", ".join("not known" if one == "None" else one for one in sorted(rows))
    cost = {f"{name} (s)": seconds for name, seconds in (run.timings or {}).items()}
    if run.peak_memory_bytes is not None:
        cost["peak memory (bytes)"] = run.peak_memory_bytes
    if run.flops is not None:
        cost |= flatten({"flops": run.flops}, "")
    verdicts = {one.falsifier: one.outcome.name.lower() for one in run.verdicts}
    return {
        "end": {"outcome": run.end["outcome"], "code": run.end["code"], "host": (run.host or {}).get("name")},
        "asked for": run.requested or {},
        "verdicts": verdicts,
        "held out, as saved": results,
        "cost": cost,
    }
