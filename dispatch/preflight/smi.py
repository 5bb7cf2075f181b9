"""Reading nvidia-smi's CSV: what it does not tell is None, never zero."""

from __future__ import annotations

from dispatch.agent.hardware import number as reading
from dispatch.agent.hardware import told
from dispatch.agent.preflight import GPU_FIELDS
from dispatch.preflight.facts import Ended

FIELDS = tuple(GPU_FIELDS.split(","))


def number(text: str | None) -> float | None:
    """A number with or without its unit; None where it is not known."""
    words = (told(text or "") or "").split()
    return reading(words[0].rstrip("%")) if words else None


def gpus(answer: Ended) -> list[dict[str, str | None]]:
    """One row a GPU, by field."""
    rows = []
    for line in answer.out.splitlines() if answer.answered else ():
        cells = [told(part) for part in line.split(",")]
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
        size = number(parts[-1]) if len(parts) > 2 else None
        found.append((int(parts[0]), ", ".join(parts[1:-1] or parts[1:]), size))  # a name may hold commas
    return found
