"""One event of a run, and reading events back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentforge.errors import RefusedError
from latentforge.spec.reading import LARGEST, parse_json

KINDS = frozenset({"phase", "step", "metric", "checkpoint", "compile", "memory", "warning", "verdict", "end"})
_LARGEST = 2**512  # what is reckoned with such numbers still fits a float
_HEAD = ("seq", "t", "wall", "run", "kind")


@dataclass(frozen=True)
class Event:
    """One line of ``events.jsonl``.

    ``seq`` counts from 0 within a run, ``t`` is seconds on the host's boot clock, ``wall`` UTC (ISO 8601),
    ``fields`` the kind's own values: what the trainer did, never what it was asked.
    """

    seq: int
    t: float
    wall: str
    run: str
    kind: str
    fields: dict[str, Any]


def parse_event(line: str | bytes) -> Event:
    """The event of one line; refused where the line is not one, or holds what no counter and no text can hold."""
    try:
        value = parse_json(line, whole=_count)
        seq, t, wall, run, kind = (value.pop(name) for name in _HEAD)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise RefusedError(f"not an event: {_shown(line)} ({error})") from error
    known = isinstance(kind, str) and kind in KINDS
    if not known or not isinstance(seq, int) or isinstance(seq, bool) or not isinstance(t, int | float):
        raise RefusedError(f"not an event (kind {kind!r}, seq {seq!r}, t {t!r}): {_shown(line)}")
    return Event(seq, float(t), str(wall), str(run), kind, value)


def _count(digits: str) -> int:
    value = int(digits)
    if abs(value) >= _LARGEST:
        raise ValueError(f"the number {digits[:20]}… is beyond all that is counted")
    return value


def sift_events(path: Path) -> tuple[list[Event], list[int]]:
    """All whole events of a file in order, and the numbers (from 1) of the whole lines that are none."""
    events, broken = [], []
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            if line.strip():
                events.append(parse_event(line))
        except RefusedError:
            broken.append(number)
    return events, broken


def read_events(path: Path) -> list[Event]:
    """All whole events of a file in order; a torn last line (a run killed while writing) is left out."""
    return [parse_event(line) for line in _whole_lines(path) if line.strip()]


def _whole_lines(path: Path) -> Iterator[bytes]:
    # O_NONBLOCK: what is no log of a run, and would keep its reader waiting, is at its end.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        while line := file.readline(LARGEST):
            if line.endswith(b"\n") or len(line) == LARGEST:  # so much without an end is no torn line of a log
                yield line.removesuffix(b"\n")


def _shown(line: str | bytes) -> str:
    text = line.decode("utf-8", "replace") if isinstance(line, bytes) else line
    return repr(text if len(text) <= 120 else text[:117] + "…")
