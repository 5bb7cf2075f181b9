"""What a judgement looks at, and the rule that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dispatch.hosts.facts import HostFacts
from dispatch.hosts.inventory import Host
from dispatch.preflight.check import Found
from dispatch.preflight.facts import Ended, PreflightFacts
from dispatch.preflight.need import Need

GIB = 2**30


@dataclass(frozen=True)
class Seen:
    """A host, what was found of it, what is needed of it, and which checks were asked for by name."""

    host: Host
    facts: HostFacts
    found: PreflightFacts
    need: Need
    gb10: bool
    asked: frozenset[str] = frozenset()

    @property
    def has_gpu(self) -> bool:
        """Whether there is a GPU, by the driver's word or by its device files."""
        tenants = self.found.tenants
        return bool(self.facts.host.gpus) or self.command("gpu").answered or bool(tenants and tenants.devices)

    def command(self, name: str) -> Ended:
        """A program's answer; one that was not run has status ``failed``."""
        return self.found.commands.get(name, Ended(err="it was not run"))

    def why(self, group: str) -> str:
        """Why a group of facts is not there."""
        return f"the host did not say: {self.found.failed.get(group, 'it was not asked')}"


Scope = Literal["every", "gb10", "asked"]
"""every: on each host · gb10: on GB10 hosts · asked: only when named, since it writes or loads the machine."""


@dataclass(frozen=True)
class Rule:
    """A check before it is applied: where it applies, what it wants, which facts it reads, what it does on the host."""

    id: str
    title: str
    rule: str
    judge: Callable[[Seen], Found]
    groups: tuple[str, ...] = ()
    scope: Scope = "every"
    gb10_only: bool = False
    gate: bool = False
    action: str | None = None
    number: int | None = None
    """Its number in the field notes."""


def gib(count: float) -> str:
    """Bytes in GiB, with one decimal."""
    return f"{count / GIB:.1f} GiB"
