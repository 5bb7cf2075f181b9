"""What a run was planned to hold beside what it held, when it is over."""

from __future__ import annotations

from dataclasses import dataclass

from latentforge.memory.plan import GIB, MemoryPlan, gib

FAR_BYTES = 8 * GIB
FAR_SHARE = 0.15


@dataclass(frozen=True)
class MeasuredMemory:
    """The peak of a run's process against its plan, in bytes.

    ``before`` is what the process held before the run began, where that is more than the plan's runtime (a run inside
    a test or a notebook): the surplus is not the run's and is taken off.
    """

    planned: int
    peak: int
    before: int = 0

    @classmethod
    def of(cls, plan: MemoryPlan, *, peak: int, before: int) -> MeasuredMemory:
        """Compare a plan with the peak of the process that ran it."""
        runtime = sum(term.bytes for term in plan.terms if term.name == "runtime")
        return cls(plan.own_bytes, peak, max(0, before - runtime))

    @property
    def measured(self) -> int:
        """The peak that is the run's own."""
        return max(0, self.peak - self.before)

    @property
    def warning(self) -> str | None:
        """A sentence where the run held over 8 GiB or 15 % more than planned: the next one may not fit."""
        over = self.measured - self.planned
        if over <= 0 or (over <= FAR_BYTES and over <= FAR_SHARE * self.planned):
            return None
        return (
            f"the run held {gib(self.measured)} GiB, {over / self.planned:.0%} more than the {gib(self.planned)} GiB "
            "planned: the arithmetic of its memory is wrong, and a larger run may not fit"
        )
