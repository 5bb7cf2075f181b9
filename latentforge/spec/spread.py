"""What of a run's spec says how its training is spread over processes, and nothing of what is trained; and the settings
of the libraries that do it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, Literal

Stage = Literal[2, 3]
_SPREAD = ("distributed", "processes")


def processes_of(kind: str, spec: Mapping[str, Any]) -> int | None:
    """The processes on each host that a run's spec asks for; None where it runs in one process by itself."""
    section = spec.get(kind, {})
    return int(section["processes"]) if section.get("distributed", "none") != "none" else None


def without_spread(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A run's spec without that: what two attempts must have in common for one to go on from the other."""
    return {
        name: {key: found for key, found in value.items() if key not in _SPREAD} if isinstance(value, dict) else value
        for name, value in spec.items()
    }


def settings_of(stage: Stage) -> dict[str, Any]:
    """DeepSpeed's own settings for a GB10, as the maintained file of the recipes says them (docs/distributed.md)."""
    file = resources.files("latentforge") / "recipes" / "deepspeed" / f"gb10-zero{stage}.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
