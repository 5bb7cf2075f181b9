"""How long a run may take for what: deadlines of its phases, from the pipeline, overridable on the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from latentforge.errors import RefusedError

MINUTE, HOUR = 60.0, 3600.0
PHASES = frozenset({"appear", "loading", "warm_up", "first_step", "other", "overall"})


@dataclass(frozen=True)
class Limits:
    """Seconds on the host's boot clock; ``None`` is no deadline.

    A run that makes steps is not held to a fixed time a step: it stands still when no step came for
    max(``floor``, ``factor`` times the step time that it has shown). The slow but steady are never flagged.
    """

    appear: float = 2 * MINUTE
    """From the start to the first byte of log or events."""
    loading: float = 10 * MINUTE
    """From the start to the end of phase ``load``."""
    warm_up: float = 10 * MINUTE
    """From there to the ready event."""
    first_step: float = 10 * MINUTE
    """From there to the first step."""
    other: float = 15 * MINUTE
    """Anything else between two signs of progress: a data or score run's phases, evaluation, saving."""
    floor: float = 1 * MINUTE
    factor: float = 10.0
    overall: float | None = HOUR
    """From the start to the end."""

    @classmethod
    def of(cls, spec: Mapping[str, Any] | None, kind: str) -> Self:
        """What the pipeline implies for a run of this kind; ``spec`` is that of the run's identity, None if unknown.

        A full run may load 100 GB and compile for minutes; a smoke run is over in minutes or something is wrong.
        """
        if kind == "build":
            return cls(other=HOUR, floor=HOUR, overall=3 * HOUR)
        if kind == "follow":
            # It waits for its leader as long as the leader's earlier stages take; its own bound ends it.
            return cls(other=100 * HOUR, floor=5 * MINUTE, overall=None)
        if (spec or {}).get("profile") != "smoke":
            # More than a hundred hours were a regression of the pace that this project is about.
            return cls(
                appear=5 * MINUTE,
                loading=HOUR,
                warm_up=HOUR,
                first_step=HOUR,
                other=2 * HOUR,
                floor=5 * MINUTE,
                overall=100 * HOUR,
            )
        return cls()

    def over(self, deadlines: Iterable[str] = (), stall: float | None = None) -> Limits:
        """With the user's own: ``SECONDS`` for the whole run or ``PHASE=SECONDS``, and the floor of the stall rule."""
        changes: dict[str, float] = {}
        for given in deadlines:
            phase, _, value = given.rpartition("=")
            name = (phase or "overall").replace("-", "_")
            if name not in PHASES:
                raise RefusedError(
                    f"--deadline {given!r}: {phase!r} is none of {', '.join(sorted(PHASES)).replace('_', '-')}"
                )
            changes[name] = _seconds("--deadline", given, value)
        if stall is not None:
            changes["floor"] = _seconds("--stall", str(stall), str(stall))
        return replace(self, **changes)

    @classmethod
    def adjuster(cls, deadlines: Iterable[str], stall: float | None) -> Callable[[Limits], Limits]:
        """What ``over`` changes, to be done to limits not yet known; RefusedError now for what cannot be meant."""
        given = tuple(deadlines)
        cls().over(given, stall)
        return lambda limits: limits.over(given, stall)

    @property
    def quiet(self) -> float:
        """How long the host may say nothing before it is asked to say at least how it is: finer than any deadline."""
        finest = min(self.floor, self.appear, self.loading, self.warm_up, self.first_step, self.other)
        return max(0.2, min(5.0, finest / 4))

    def told(self) -> str:
        """In the words of a plan."""
        overall = "no deadline" if self.overall is None else f"deadline {span(self.overall)}"
        return f"{overall}, stall after {span(self.floor)} without a step"


def span(seconds: float) -> str:
    """A length of time as a plan says it: 45 s, 12 min, 100 h."""
    if seconds < 100 and seconds != MINUTE:
        return f"{seconds:g} s"
    return f"{seconds / MINUTE:g} min" if seconds < 2 * HOUR else f"{seconds / HOUR:g} h"


def _seconds(option: str, given: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RefusedError(f"{option} {given!r} is not a number of seconds above 0")
    return seconds
