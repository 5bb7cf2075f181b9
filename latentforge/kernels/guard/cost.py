"""How long a call takes, by the device's own clock, and whether the machine held still meanwhile."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

SLOW = 0.9
"""A kernel with less than this speed of what it would replace is degraded."""
_LOW_POWER_WATTS = 30.0
_CLOCK_MOVED = 0.1


@dataclass(frozen=True)
class Effort:
    """At least this many calls and this many seconds, after as many calls to get warm."""

    calls: int = 20
    seconds: float = 1.0


def milliseconds(
    calls: Sequence[tuple[Callable[[], object], Callable[[], None]]], device: torch.device, effort: Effort
) -> list[float]:
    """Median milliseconds of each (call, prepare); ``prepare`` runs before its call, outside the measured time.

    The calls take turns, so that a clock that moves or a busy neighbour falls on all of them.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(effort.calls):
        for call, prepare in calls:
            prepare()
            call()
    began = time.perf_counter()
    while len(times[0]) < effort.calls or time.perf_counter() - began < effort.seconds:
        for taken, (call, prepare) in zip(times, calls, strict=True):
            prepare()
            taken.append(_once_cuda(call) if device.type == "cuda" else _once(call))
    return [statistics.median(taken) for taken in times]


def _once(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def _once_cuda(call: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def gpu_reading() -> tuple[float | None, float | None]:
    """(SM clock in MHz, power in watts) of the first GPU; None for what it does not tell."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None, None
    command = [program, "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None, None
    values = [_number(field) for field in said.strip().split(",")]
    return (values[0], values[1]) if len(values) == 2 else (None, None)


def held_still(before: tuple[float | None, float | None], after: tuple[float | None, float | None]) -> str | None:
    """Why timings between two readings do not count; None where they do. What is not told does not disqualify."""
    if before[0] and after[0] and abs(after[0] - before[0]) > _CLOCK_MOVED * before[0]:
        return f"the clock moved from {before[0]:.0f} to {after[0]:.0f} MHz"
    if after[1] is not None and after[1] < _LOW_POWER_WATTS:
        return f"power {after[1]:.0f} W under load: a low-power state"
    return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
