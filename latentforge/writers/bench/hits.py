"""Of a run's answers, how many came from a cache instead of a teacher: read from what its runs wrote down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latentforge.errors import RefusedError
from latentforge.events import Event, read_events
from latentforge.spec.run import RunDir

_RATE = "teacher_hit_rate"


@dataclass(frozen=True)
class Hits:
    """The share of answers that a cache gave, as ``run`` counted it at its end."""

    rate: float
    run: str


def hits_of(path: Path) -> Hits | None:
    """The hit rate that the run at ``path`` says of its own answers; else the lowest of the runs that it is made from,
    where they lie beside it, or of those that these are made from.

    None where none of them says one. A student that is fed from a store has a rate of 1: the runs that filled the store
    were the warm-up. RefusedError where ``path`` is no run's folder.
    """
    try:
        start = RunDir(path.expanduser().resolve())
    except RefusedError:
        raise RefusedError(
            f"{path} is no run's folder: a hit rate is read from a run's events", next="--run runs/latent-…"
        ) from None
    if not start.events_file.is_file():
        raise RefusedError(f"{path} has no {start.events_file.name}: a hit rate is read from a run's events")
    level = [start]
    while level:
        found = [Hits(rate, run.run) for run in level if (rate := _last_rate(run)) is not None]
        if found:
            return min(found, key=lambda one: one.rate)
        level = [one for run in level for one in _inputs(run)]
    return None


def _inputs(run: RunDir) -> list[RunDir]:
    """The runs that a run was made from, as far as they are there; one that it only stands beside is none of them."""
    if not run.launch_file.is_file():
        return []
    found = [run.input_run(name) for name in run.load_launch().resolved if name != "beside"]
    return [one for one in found if one is not None and one.events_file.is_file()]


def _last_rate(run: RunDir) -> float | None:
    rates = [_rate(event) for event in read_events(run.events_file) if event.kind == "metric"]
    return next((rate for rate in reversed(rates) if rate is not None), None)


def _rate(event: Event) -> float | None:
    value = event.fields.get(_RATE)
    return float(value) if isinstance(value, int | float) else None
