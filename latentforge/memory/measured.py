"""What a run was planned to hold beside what it held, when it is over."""

from __future__ import annotations

from dataclasses import dataclass

from latentforge.memory.plan import GIB, MemoryPlan, gib

FAR_BYTES = 8 * GIB
FAR_SHARE = 0.15


@dataclass(frozen=True)
class MeasuredMemory:
    """The peak of a run's processes against its plan, in bytes.

    ``peak`` is what was resident, ``in_use`` that without what the C library had been given back and kept (None: not
    known). ``before`` is what the process held before the run began, where that is more than the plan's runtime (a run
    inside a test or a notebook): the surplus is not the run's and is taken off.
    """

    planned: int
    peak: int
    in_use: int | None = None
    before: int = 0

    @classmethod
    def of(cls, plan: MemoryPlan, *, peak: int, in_use: int | None, before: int) -> MeasuredMemory:
        """Compare a plan with the peak of the processes that ran it."""
        runtime = sum(term.bytes for term in plan.terms if term.name == "runtime")
        return cls(plan.own_bytes, peak, in_use, max(0, before - runtime))

    @property
    def resident(self) -> int:
        """The resident peak that is the run's own."""
        return max(0, self.peak - self.before)

    @property
    def measured(self) -> int:
        """The peak that a plan counts: what was in use, or resident where that is not known."""
        return self.resident if self.in_use is None else max(0, self.in_use - self.before)

    @property
    def line(self) -> str:
        """For the log: what was measured, what was planned, and what was resident beyond."""
        share = f"{self.measured / self.planned:.0%}" if self.planned else "?"
        kept = self.resident - self.measured
        beyond = f"; {gib(kept)} GiB more resident, freed and kept by the C library" if kept > 0 else ""
        return f"{gib(self.measured)} of {gib(self.planned)} GiB planned ({share}){beyond}"

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
