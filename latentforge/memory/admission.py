"""Whether a stage may start on a host: four conditions that must all hold, each with its sum.

They are those of the GB10 notes, section (c), with the design's margin instead of a fixed 16 GiB. What was not
measured is not known, and not met silently.
"""

from __future__ import annotations

from dataclasses import dataclass

from latentforge.memory.host import HostMemory
from latentforge.memory.plan import GIB, MemoryPlan, margin
from latentforge.verdicts import Outcome, meet

COMPILER = 8 * GIB
"""What one compiler of kernels may take. They run before the weights are loaded, never beside them."""
COMPOSITE = 1.15
"""By how much the first step may exceed what a step was measured to hold."""


@dataclass(frozen=True)
class Condition:
    """``need`` bytes, the margin included, must be there of ``have``; None: not known."""

    name: str
    need: int | None
    have: int | None
    why: str

    @property
    def outcome(self) -> Outcome:
        """Pass where it holds; unknown where a side of it is not known."""
        if self.need is None or self.have is None:
            return Outcome.UNKNOWN
        return Outcome.PASS if self.need <= self.have else Outcome.FAIL


@dataclass(frozen=True)
class Admission:
    """The conditions of one stage, and the worst of them. What is only unmeasured does not make a stage unknown."""

    stage: str
    conditions: tuple[Condition, ...]

    @property
    def outcome(self) -> Outcome:
        """The worst of the conditions that could be judged; unknown where the steady state could not."""
        judged = [c.outcome for c in self.conditions if c.name == "steady" or c.outcome is not Outcome.UNKNOWN]
        return meet(judged)

    @property
    def refused(self) -> tuple[Condition, ...]:
        """The conditions that do not hold."""
        return tuple(c for c in self.conditions if c.outcome is Outcome.FAIL)


def admission(plan: MemoryPlan, host: HostMemory, *, jobs: int = 0, measured_peak: int | None = None) -> Admission:
    """Judge a stage's plan by what the host has free before it.

    ``jobs`` compilers may run while kernels are proven (before the models are loaded); ``measured_peak`` is what a step
    of the same composite was seen to hold (a canary's), None where there was none.
    """
    if host.total is None:
        return Admission(plan.run, (Condition("steady", None, host.available, "the host does not say what it has"),))
    room = margin(host.total)
    # What is known of a plan is the least that it takes: where even that is not there, the rest need not be known.
    least = plan.bytes + room
    enough = least <= (host.total if host.available is None else host.available)
    steady = None if plan.unknown and enough else least
    why = "all terms and the margin"
    if plan.unknown:
        why = f"the size of {', '.join(plan.unknown)} is not known"
    conditions = [Condition("steady", steady, host.available, why)]
    if plan.load:
        conditions.append(
            Condition("load", plan.load + room, host.available, "the weights, and the file where they are converted")
        )
    if jobs:
        conditions.append(
            Condition(
                "warm-up", jobs * COMPILER + room, host.available, f"{jobs} compiler{'s' if jobs > 1 else ''} at once"
            )
        )
    first = None if measured_peak is None else int(measured_peak * COMPOSITE) + room
    why = "a measured step x 1.15" if measured_peak is not None else "no step of it was measured yet"
    conditions.append(Condition("first step", first, host.available, why))
    return Admission(plan.run, tuple(conditions))
