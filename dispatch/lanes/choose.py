"""Choosing among lanes: a pure function from what each lane said to the one that takes the run, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dispatch.hosts.facts import RunState
from dispatch.planning.lane import LaneChoice
from dispatch.planning.plan import Plan
from latentforge.errors import LatentForgeError, RefusedError, TransportError, UnknownOutcomeError
from latentforge.verdicts import ExitCode


@dataclass(frozen=True)
class LaneSeen:
    """What one lane said: its plan, or the error that stood in the way; ``given`` is a run of this plan that this
    laptop gave it earlier.

    ``states`` is what a lane that cannot be planned on said of the run and its attempts all the same; None where it was
    not asked, or did not answer.
    """

    host: str
    plan: Plan | None = None
    error: LatentForgeError | None = None
    given: str | None = None
    states: Mapping[str, RunState] | None = None

    @property
    def unreachable(self) -> bool:
        """Whether the lane could not be asked."""
        return isinstance(self.error, TransportError | UnknownOutcomeError)

    @property
    def unfit(self) -> str | None:
        """Why it cannot take the run; None where it can."""
        if self.error is not None:
            first = str(self.error).splitlines()[0]
            return f"unreachable: {first}" if self.unreachable else first
        assert self.plan is not None
        return self.plan.refusals[0].why if self.plan.refusals else None

    @property
    def there(self) -> str | None:
        """A run of the plan that is on a lane which cannot be planned on."""
        return next((run for run, state in (self.states or {}).items() if state.state != "absent"), None)

    @property
    def open(self) -> bool:
        """Whether it may have the run for all that is known: the host alone can say, and has not said no."""
        return self.plan is None and (self.states is None or self.there is not None)

    @property
    def holds(self) -> str | None:
        """How the run stands there, where it is there: going on, passed, or ended."""
        if self.plan is None:
            return None
        last = self.plan.runs[-1]
        if last.state is not None and last.state.going_on:
            return "going on"
        if last.state is not None and last.state.passed:
            return "passed"
        stopped = any(run.will == "ended" for run in self.plan.runs)
        return "ended" if stopped or (last.state is not None and last.state.has_ended) else None


def choose_lane(seen: Sequence[LaneSeen], *, abandon: bool, command: str) -> LaneChoice:
    """The lane that already has the run, else the first that is fit; a busy one only where no other is fit.

    A lane that could not be asked may have the run, from this laptop or from another one, so nothing is started
    elsewhere, unless ``abandon``.
    """
    asked = tuple(lane.host for lane in seen)
    for how in ("going on", "passed"):
        if (holder := next((lane for lane in seen if lane.holds == how), None)) is not None:
            return _there(asked, holder, seen)
    silent = [] if abandon else [lane for lane in seen if lane.open]
    if known := next((lane for lane in silent if lane.given or lane.there), None):
        raise _open(known, command)
    if (holder := next((lane for lane in seen if lane.holds == "ended"), None)) is not None:
        if silent and holder.plan is not None and holder.plan.starts_something:
            raise _open(silent[0], command)
        return _there(asked, holder, seen)
    fit = [lane for lane in seen if lane.unfit is None]
    free = [lane for lane in fit if lane.plan is not None and lane.plan.busy is None]
    if not fit:
        raise _none_fit(seen, command)
    if silent:
        raise _open(silent[0], command)
    chosen = (free or fit)[0]
    because = "first that is fit" if free else f"device lease held by {chosen.plan.busy if chosen.plan else ''}; waits"
    over = tuple((lane.host, _against(lane)) for lane in seen[: seen.index(chosen)])
    return LaneChoice(asked, chosen.host, because, over)


def _open(lane: LaneSeen, command: str) -> UnknownOutcomeError:
    if lane.there is not None:
        what = f"lane {lane.host} has {lane.there}, and cannot be planned on: {lane.error}"
    elif lane.given is not None:
        what = f"lane {lane.host} cannot be asked, and may have {lane.given}, which this laptop gave it: {lane.error}"
    else:
        what = f"lane {lane.host} cannot be asked, and may have the run, from another laptop say: {lane.error}"
    return UnknownOutcomeError(
        what, next=f"wait until it answers, or start the run elsewhere all the same:  {command} --abandon"
    )


def _there(asked: tuple[str, ...], holder: LaneSeen, seen: Sequence[LaneSeen]) -> LaneChoice:
    assert holder.plan is not None
    over = tuple((lane.host, lane.unfit or "has no run of it") for lane in seen[: seen.index(holder)])
    return LaneChoice(asked, holder.host, f"{holder.plan.final.run} is there, {holder.holds}", over)


def _against(lane: LaneSeen) -> str:
    if lane.unfit is None:
        assert lane.plan is not None
        return f"device lease held by {lane.plan.busy}"
    left = f"; abandoned, though it may have {lane.there or lane.given or 'the run'}"
    return lane.unfit + (left if lane.open else "")


def _none_fit(seen: Sequence[LaneSeen], command: str) -> LatentForgeError:
    """One refusal for all lanes: 7 where waiting helps, else 1, 2 or 3, and 6 only where none could be asked."""
    codes = []
    for lane in seen:
        if lane.error is not None:
            codes.append(lane.error.code)
        elif lane.plan is not None:
            codes.append(lane.plan.refusals[0].code)
    order = (ExitCode.BUSY, ExitCode.FAIL, ExitCode.REFUSED, ExitCode.CRASHED, ExitCode.UNKNOWN, ExitCode.TRANSPORT)
    code = next((code for code in order if code in codes), ExitCode.REFUSED)
    lines = "".join(f"\n  {lane.host}: {lane.unfit}" for lane in seen)
    following = f"{command} --wait" if code is ExitCode.BUSY else _next_of(seen[0])
    return RefusedError(f"no lane can take the run:{lines}", next=following, code=code)


def _next_of(lane: LaneSeen) -> str | None:
    if lane.error is not None:
        return lane.error.next
    return lane.plan.refusals[0].next if lane.plan is not None else None
