"""Which runner a plan uses, and where its memory watchdog stands: chosen from facts, shown, and then asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dispatch.hosts.facts import HostFacts
from dispatch.hosts.inventory import Host
from dispatch.hosts.runner import GIB, Floors, RunnerFacts


@dataclass(frozen=True)
class RunnerChoice:
    """The runner of a plan's runs, why it is that one, and the floors of the watchdog beside them."""

    name: Literal["detached", "systemd"]
    why: str
    floors: Floors
    obstacle: str | None = None
    """Why the runner that the inventory asks for cannot work; the plan is refused then."""
    given: bool = False
    """Whether the inventory sets a floor."""

    @property
    def asked(self) -> str:
        """What the agent is asked for: one that cannot work is refused by it too, never replaced."""
        return self.name if self.obstacle is None else "systemd"

    @property
    def words(self) -> str:
        """The runner in the line of the run that is launched."""
        return "detached runner" if self.name == "detached" else "systemd unit"

    @property
    def text(self) -> str:
        """The line below a plan."""
        return f"runner: {self.name} ({self.why}); watchdog: {self.floors.text}"

    def launch_fields(self) -> dict[str, Any]:
        """What a launch description says of it: nothing where the host's own floors hold."""
        return {"memory_floors": {"warn": self.floors.warn, "kill": self.floors.kill}} if self.given else {}


def choose_runner(host: Host, facts: HostFacts) -> RunnerChoice:
    """The inventory's runner where it can work; ``auto`` is a systemd unit where one can, else a detached process."""
    seen = facts.runner or RunnerFacts()
    warn, kill = host.warn_below_gib, host.kill_below_gib
    floors = seen.floors
    if warn is not None or kill is not None:
        lower = floors.kill if kill is None else int(kill * GIB)
        floors = Floors(warn=max(lower, floors.warn if warn is None else int(warn * GIB)), kill=lower)
    given = floors != seen.floors
    if host.runner == "detached":
        return RunnerChoice("detached", "the inventory says so", floors, given=given)
    if seen.systemd:
        return RunnerChoice("systemd", seen.why, floors, given=given)
    obstacle = seen.why if host.runner == "systemd" else None
    return RunnerChoice("detached", seen.why, floors, obstacle=obstacle, given=given)
