"""What a run does that makes no step: told from two heartbeats of its supervisor."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["hung, low power", "GPU-bound", "CPU-bound", "I/O-bound", "idle", "unknown"]

LOW_POWER_WATTS, HIGH_UTILISATION = 30.0, 90.0
"""A GB10 that works draws 45 to 90 W; a deadlocked kernel shows 96 % at 16 to 27 W."""
BUSY_GPU_PERCENT, BUSY_CORES, BUSY_BYTES = 10.0, 0.2, 1e6
_APART_SECONDS, _KEPT = 1.0, 24


@dataclass(frozen=True)
class Activity:
    """A kind, and the figures behind it."""

    kind: Kind
    text: str


class Beats:
    """The heartbeats seen of a run, the newest last; each counted once."""

    def __init__(self) -> None:
        self._seen: deque[dict[str, Any]] = deque(maxlen=_KEPT)

    def __len__(self) -> int:
        return len(self._seen)

    def feed(self, beat: Mapping[str, Any] | None, clock: float) -> None:
        """Take a state's beat in, as the host's clock stands; one that is yet to come is no beat."""
        at = _number((beat or {}).get("clock"))
        if beat and at is not None and at <= clock and (not self._seen or at > self.last["clock"]):
            self._seen.append(dict(beat))

    @property
    def last(self) -> dict[str, Any]:
        """The newest; empty where there is none."""
        return self._seen[-1] if self._seen else {}

    @property
    def celsius(self) -> float | None:
        """The GPU's temperature, where it is known."""
        return _number((self.last.get("gpu") or {}).get("celsius"))

    def activity(self, since: float) -> Activity:
        """What went on since a moment of the host's clock: between the last beat before it and the newest."""
        later = [beat for beat in self._seen if beat["clock"] >= since]
        earlier = [beat for beat in self._seen if beat["clock"] < since][-1:]
        beats = earlier + later
        if len(beats) < 2 or beats[-1]["clock"] - beats[0]["clock"] < _APART_SECONDS:
            return Activity("unknown", "what it does is not known: fewer than two heartbeats")
        return classify(beats[0], beats[-1])


def classify(first: Mapping[str, Any], last: Mapping[str, Any]) -> Activity:
    """What a run did between two beats. A figure that is null on either side is unknown, never zero."""
    gpu = last.get("gpu") or {}
    util, watts = _number(gpu.get("util")), _number(gpu.get("watts"))
    seconds = float(last["clock"]) - float(first["clock"])
    cores, rate = (_rate(first, last, name, seconds) for name in ("cpu", "io"))
    figures = [] if util is None else [f"GPU {util:.0f} %" + (f" at {watts:.0f} W" if watts is not None else "")]
    figures += [] if cores is None else [f"CPU {cores * 100:.0f} %"]
    figures += [] if rate is None else [f"I/O {rate / 1e6:.1f} MB/s"]
    said = ", ".join(figures)
    if util is not None and util >= HIGH_UTILISATION and watts is not None and watts < LOW_POWER_WATTS:
        return Activity("hung, low power", f"{said}: hung, low power")
    if util is not None and util >= BUSY_GPU_PERCENT:
        return Activity("GPU-bound", f"{said}: GPU-bound")
    if cores is not None and cores >= BUSY_CORES:
        return Activity("CPU-bound", f"{said}: CPU-bound")
    if rate is not None and rate >= BUSY_BYTES:
        return Activity("I/O-bound", f"{said}: I/O-bound")
    if cores is not None and (rate is not None or cores < 0.01):
        return Activity("idle", f"{said}: idle")
    return Activity("unknown", f"{said or 'no telemetry'}: what it does is not known")


def _rate(first: Mapping[str, Any], last: Mapping[str, Any], name: str, seconds: float) -> float | None:
    before, after = _number(first.get(name)), _number(last.get(name))
    # A tree that lost a child may count less than before; that is no work, and no less than none.
    return None if before is None or after is None or seconds <= 0 else max(0.0, (after - before) / seconds)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value == value else None
