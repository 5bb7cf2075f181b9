"""Reading nvidia-smi's CSV: what it does not tell is None, never zero."""

from __future__ import annotations

from dispatch.agent.preflight import GPU_FIELDS
from dispatch.preflight.facts import Ended

FIELDS = tuple(GPU_FIELDS.split(","))
_NOTHING = ("", "n/a", "not supported", "unknown error", "not available", "err!", "insufficient permissions")


def cell(text: str) -> str | None:
    """One cell, or None for each of the ways in which nvidia-smi says that it does not know."""
    kept = text.strip()
    return None if kept.strip("[]").lower() in _NOTHING or "GPU access blocked" in kept else kept


def number(text: str | None) -> float | None:
    """A number with or without its unit; None where it is not known."""
    words = (cell(text or "") or "").split()
    try:
        return float(words[0].rstrip("%")) if words else None
    except ValueError:
        return None


def gpus(answer: Ended) -> list[dict[str, str | None]]:
    """One row a GPU, by field."""
    rows = []
    for line in answer.out.splitlines() if answer.answered else ():
        cells = [cell(part) for part in line.split(",")]
        if len(cells) == len(FIELDS):
            rows.append(dict(zip(FIELDS, cells, strict=True)))
    return rows


def compute_apps(answer: Ended) -> list[tuple[int, str, float | None]] | None:
    """(pid, name, MiB) of each process on the driver's list; None where there is no list to believe."""
    if not answer.answered:
        return None
    found = []
    for line in answer.out.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if not line.strip() or "no running" in line.lower():
            continue
        if len(parts) < 2 or not parts[0].isdigit():
            return None
        found.append((int(parts[0]), parts[1], number(parts[2]) if len(parts) > 2 else None))
    return found
