"""Of a run's answers, how many came from a cache instead of a teacher: read from what its runs wrote down."""

from __future__ import annotations

from collections.abc import Iterator
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
    """The lowest hit rate of the run at ``path`` and of those that it builds on, where they lie beside it.

    None where none of them had a cache that counted. A run that filled an empty cache has a low rate: after warm-up is
    the next run's. RefusedError where ``path`` is no run's folder.
    """
    try:
        start = RunDir(path.expanduser().resolve())
    except RefusedError:
        raise RefusedError(
            f"{path} is no run's folder: a hit rate is read from a run's events", next="--run runs/latent-…"
        ) from None
    if not start.events_file.is_file():
        raise RefusedError(f"{path} has no {start.events_file.name}: a hit rate is read from a run's events")
    found = [Hits(rate, run.run) for run in _with_inputs(start) if (rate := _last_rate(run)) is not None]
    return min(found, key=lambda one: one.rate, default=None)


def _with_inputs(start: RunDir) -> Iterator[RunDir]:
    """A run and all that it builds on, as far as they are there; each once."""
    waiting, seen = [start], set[str]()
    while waiting:
        run = waiting.pop()
        if run.run in seen or not run.events_file.is_file():
            continue
        seen.add(run.run)
        yield run
        if run.launch_file.is_file():
            inputs = (run.input_run(name) for name in run.load_launch().resolved)
            waiting += [one for one in inputs if one is not None]


def _last_rate(run: RunDir) -> float | None:
    rates = [_rate(event) for event in read_events(run.events_file) if event.kind == "metric"]
    return next((rate for rate in reversed(rates) if rate is not None), None)


def _rate(event: Event) -> float | None:
    value = event.fields.get(_RATE)
    return float(value) if isinstance(value, int | float) else None
