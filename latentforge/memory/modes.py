"""How teacher and student share one host: one after the other, in turns, or side by side where the sum fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latentforge.errors import RefusedError
from latentforge.memory.admission import Admission, admission
from latentforge.memory.estimate import pipeline_memory
from latentforge.memory.host import HostMemory
from latentforge.memory.known import KnownModel
from latentforge.memory.plan import GIB, MemoryPlan, gib, largest, margin
from latentforge.spec.sections import PipelineSpec
from latentforge.verdicts import Outcome, meet

Mode = Literal["sequential", "alternating", "concurrent"]
MODES: tuple[Mode, ...] = ("sequential", "alternating", "concurrent")
SHARD_TOKENS = 20_000_000
"""A restart of the teacher takes 2 to 15 minutes: fewer tokens than this between two of them are not worth it."""
RETURNED = 4 * GIB
"""The teacher is gone when MemAvailable is this near to what it was before."""


@dataclass(frozen=True)
class ModePlan:
    """One mode on one host: its stages in the order in which they run, what each needs, and whether they may start.

    ``peak`` is the largest stage: stages of a mode are never in memory together.
    """

    mode: Mode
    stages: tuple[MemoryPlan, ...]
    admissions: tuple[Admission, ...]
    host: HostMemory
    note: str

    @property
    def peak(self) -> MemoryPlan:
        """The stage that needs most, and what of any stage is not known."""
        return largest(self.stages)

    @property
    def outcome(self) -> Outcome:
        """Pass where every stage may start."""
        return meet([a.outcome for a in self.admissions])

    @property
    def reason(self) -> str:
        """One sentence: which stage decides, with its sum."""
        refused = [(a, c) for a in self.admissions for c in a.refused]
        if refused:
            where, condition = refused[0]
            return (
                f"stage {where.stage} does not fit ({condition.name}): {gib(condition.need or 0)} GiB with the margin, "
                f"{gib(condition.have or 0)} GiB are free"
            )
        if self.outcome is Outcome.UNKNOWN:
            missing = ", ".join(self.peak.unknown)
            return f"the size of {missing} is not known" if missing else "the host does not say what is free"
        assert self.host.total is not None
        under = gib(ceiling(self.host.total))
        return f"peak {gib(self.peak.bytes)} GiB in stage {self.peak.run}, under the ceiling of {under} GiB"


def ceiling(total: int) -> int:
    """Bytes that a plan may come to on a host with ``total``: what the margin leaves."""
    return total - margin(total)


def mode_of(spec: PipelineSpec) -> Mode:
    """The mode in which an effective pipeline runs: by whether its student's targets are stored before it starts."""
    live = spec.distils and (spec.distill.targets != "store" or spec.distill.on_policy > 0)
    return "concurrent" if live else "sequential"


def plan_mode(
    spec: PipelineSpec,
    mode: Mode,
    host: HostMemory,
    *,
    device: str = "cpu",
    teacher: KnownModel | None = None,
    student: KnownModel | None = None,
    tokens: int | None = None,
    jobs: int | None = None,
) -> ModePlan:
    """The pipeline's stages in ``mode`` on ``host``, whatever the spec asks.

    ``tokens`` of the corpus, where they are known, say how often an alternating teacher is started.
    """
    targets = "live" if mode == "concurrent" else "store"
    changed: dict[str, object] = {"targets": targets}
    if mode != "concurrent":
        changed["on_policy"] = 0.0
    asked = spec.model_copy(update={"distill": spec.distill.model_copy(update=changed)})
    plans = tuple(pipeline_memory(asked, device=device, teacher=teacher, student=student).values())
    compilers = (1 if device == "cuda" else 0) if jobs is None else jobs
    admissions = tuple(admission(plan, host, jobs=compilers) for plan in plans)
    note = _note(mode, tokens) if spec.has_teacher else "no run asks a teacher"
    return ModePlan(mode, plans, admissions, host, note)


def choose_mode(asked: Mode, plans: dict[Mode, ModePlan]) -> tuple[Mode, str]:
    """The mode that runs, and why. What the spec asks is never replaced by another silently: it runs or is refused."""
    plan, sequential, concurrent = plans[asked], plans["sequential"], plans["concurrent"]
    if "distill" not in [stage.run for stage in plan.stages]:
        return asked, "what is trained here is trained alone: no teacher stands beside it in any mode"
    if asked == "concurrent":
        if plan.outcome is not Outcome.FAIL:
            return asked, f"the spec wants a live teacher beside the student: {plan.reason}"
        other = "; sequential fits" if sequential.outcome is Outcome.PASS else ""
        raise RefusedError(
            f"a live teacher beside the student does not fit: {plan.reason}{other}",
            next="set distill.targets = 'store', distill.on_policy = 0 and a temperature of score.temperatures",
        )
    beside = {Outcome.PASS: "would fit too", Outcome.FAIL: "would not fit"}.get(concurrent.outcome, "cannot be judged")
    return asked, (
        f"targets are stored, so the teacher is gone before the student comes: the largest stage counts, not the sum; "
        f"side by side {beside} ({gib(concurrent.peak.bytes)} GiB)"
    )


def _note(mode: Mode, tokens: int | None) -> str:
    if mode == "sequential":
        return (
            f"score, store, stop the teacher, wait until what is free is within {RETURNED // GIB} GiB of what it was, "
            "train"
        )
    if mode == "concurrent":
        return "teacher and student side by side: the cache of the teacher is pinned in bytes"
    least = f"of at least {SHARD_TOKENS / 1e6:.0f} M tokens: each costs a restart of the teacher"
    if tokens is None:
        return f"shards {least}"
    shards = max(1, tokens // SHARD_TOKENS)
    return f"{shards} shard{'s' if shards > 1 else ''} {least}"
