"""Which runner carries a supervisor on this host: a systemd unit of the user's own, or a detached session leader."""

from __future__ import annotations

from typing import Any

from . import systemd
from .paths import Root
from .protocol import AgentError
from .telemetry import total_memory
from .watchdog import Floors

RUNNERS = ("auto", "detached", "systemd")


def check(wanted: str) -> None:
    """Refuse a runner that does not exist."""
    if wanted not in RUNNERS:
        raise AgentError("refused", f"runner={wanted!r} is not one of {', '.join(RUNNERS)}")


def facts(root: Root) -> dict[str, Any]:
    """Whether systemd units can carry runs here and why (not), whether lingering is on, and the watchdog's floors."""
    why = systemd.obstacle(str(root.agent))
    floors = Floors.usual(total_memory())
    return {
        "systemd": why is None,
        "why": why or f"systemd {systemd.version()}, lingering is on",
        "linger": systemd.lingers(),
        "floors": floors._asdict(),
    }


def choose(wanted: str, program: str) -> str:
    """The runner for the agent at `program`: `auto` is systemd where it can work, a named one is that or refused."""
    if wanted == "detached":
        return wanted
    why = systemd.obstacle(program)
    if why is None:
        return "systemd"
    if wanted == "auto":
        return "detached"
    raise AgentError("refused", f"runner='systemd' cannot work on this host: {why}", next="use runner = 'detached'")
