"""The journal of a run: what the agent did to it, one flushed JSON line each."""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple

from .durable import append_line
from .paths import RunPaths
from .processes import boot_clock, boot_id


class Journal(NamedTuple):
    """The last `launching` and the last `started` of a run, and all its events."""

    launching: dict[str, Any] | None
    started: dict[str, Any] | None
    events: list[dict[str, Any]]


def record(run: RunPaths, event: str, **fields: Any) -> dict[str, Any]:
    """Append one event with the boot it happened in and both clocks."""
    line = {"event": event, "boot_id": boot_id(), "clock": boot_clock(), "wall": time.time(), **fields}
    append_line(run.journal, line)
    return line


def read(run: RunPaths) -> Journal:
    """The journal of `run`; a torn line (the disk was full) is skipped."""
    events: list[dict[str, Any]] = []
    try:
        data = run.journal.read_bytes()
    except OSError:
        return Journal(None, None, events)
    launching = started = None
    for line in data.split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if not isinstance(event, dict):
            continue
        events.append(event)
        if event.get("event") == "launching":
            launching = event
        elif event.get("event") == "started":
            started = event
    return Journal(launching, started, events)
