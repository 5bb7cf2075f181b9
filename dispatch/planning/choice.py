"""Which run of each kind a plan stands on: one that is there, one that goes on, or a new one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dispatch.hosts.facts import HostFacts, KinRun, RunState, moment
from latentforge.errors import RefusedError
from latentforge.spec.pipeline import PlannedRun, Role
from latentforge.spec.run import InputRef

RunWill = Literal["keep", "run", "follow", "ended", "skip"]
"""keep: it passed · run: it is to be started · follow: it goes on · ended: it ended without passing, and is reported ·
skip: it cannot be run because one before it ended."""

MAX_ATTEMPTS = 64


@dataclass(frozen=True)
class ChosenRun:
    """One run of a plan, with what will be done about it and why."""

    kind: str
    run: str
    identity: str
    kin: str
    resolved: dict[str, InputRef]
    will: RunWill
    because: str
    state: RunState | None = None
    predecessor: str | None = None


def attempt_ids(planned: PlannedRun, kin_runs: Sequence[KinRun]) -> list[str]:
    """The ids of a run's attempts that are on the host (beside the first, which is always asked for)."""
    highest = max((kin.attempt for kin in kin_runs), default=1)
    present = {kin.id for kin in kin_runs}
    ids = [planned.identity.at_attempt(n).run_id for n in range(2, min(highest, MAX_ATTEMPTS) + 1)]
    return [run for run in ids if run in present]


def choose(planned: Sequence[PlannedRun], facts: HostFacts, *, attempt_next: bool) -> list[ChosenRun]:
    """Choose a run for each kind of a pipeline, in its order.

    A bare ``go`` never starts an ended run again. ``attempt_next`` gives a next attempt to the first run that ended
    without passing, or to the last run of the pipeline where all passed.
    """
    found: dict[Role, _Found] = {run.role: _Found(run, facts) for run in planned}
    last = planned[-1]
    needed = _needed(planned, found, attempt_next)
    again = _again(planned, found, needed) if attempt_next else None
    chosen: list[ChosenRun] = []
    stopped: ChosenRun | None = None
    for run in planned:
        replaced = {one.run_id: other.run for one, other in zip(planned, chosen, strict=False)}
        resolved = {
            name: {"run": replaced[ref["run"]]} if "run" in ref else dict(ref) for name, ref in run.resolved.items()
        }
        one = _chosen(run, found[run.role], resolved, again=run.role == again, needed=run.role in needed)
        if stopped is not None and one.will == "run":
            one = _as(one, "skip", f"{stopped.run} ended before it")
        if one.will == "ended":
            stopped = one
        chosen.append(one)
    assert chosen[-1].kind == last.role
    return chosen


class _Found:
    """What of one planned run is on the host: its latest attempt, and a kin that passed."""

    def __init__(self, planned: PlannedRun, facts: HostFacts) -> None:
        kin_runs = facts.kin_runs.get(planned.kin, ())
        self.attempt = 1
        self.run = planned.run_id
        ids = [planned.identity.at_attempt(n).run_id for n in range(1, MAX_ATTEMPTS + 1)]
        for number, run in enumerate(ids, start=1):
            if run in facts.runs and facts.runs[run].state != "absent":
                self.attempt, self.run = number, run
        self.state = facts.runs.get(self.run, RunState(state="absent"))
        self.identity = planned.identity.at_attempt(self.attempt)
        passed = sorted((kin for kin in kin_runs if kin.passed), key=lambda kin: kin.id)
        # Runs that train the final student, or vouch for that, are never taken over from other code.
        self.kin = (
            next((kin for kin in passed if kin.id not in ids), None)
            if planned.kind not in ("distill", "latent", "bench")
            else None
        )
        mine = next((kin for kin in kin_runs if kin.id == self.run), None)
        self.stale = stale_canary(mine, facts) if planned.is_canary and self.state.passed else None

    @property
    def expands(self) -> bool:
        """Whether its own inputs are wanted, so that it can be started."""
        absent = self.is_absent and self.kin is None
        return absent or self.stale is not None or self.state.state in ("queued", "starting")

    @property
    def is_absent(self) -> bool:
        return self.state.state in ("absent", "reserved")


def stale_canary(ran: KinRun | None, facts: HostFacts) -> str | None:
    """Why a canary that passed vouches for nothing now; None where it does. It is fresh under its boot and driver."""
    if ran is None or ran.boot_id is None:
        return "under which boot it ran is not known"
    if ran.boot_id != facts.host.boot_id:
        return "the host was restarted since"
    if ran.driver != facts.host.driver:
        return f"the driver was {ran.driver or 'none'}, is {facts.host.driver or 'none'}"
    return None


def _needed(planned: Sequence[PlannedRun], found: Mapping[Role, _Found], attempt_next: bool) -> set[str]:
    """The roles whose products something still wants: the last run, and the inputs of each run that will be started."""
    needed: set[str] = {planned[-1].role}
    by_id = {run.run_id: run.role for run in planned}
    for run in reversed(planned):
        if run.role in needed and (attempt_next or found[run.role].expands):
            needed |= {by_id[ref["run"]] for ref in run.resolved.values() if "run" in ref}
    return needed


def _again(planned: Sequence[PlannedRun], found: Mapping[Role, _Found], needed: set[str]) -> str:
    for run in planned:
        one = found[run.role]
        if run.role in needed and one.state.going_on:
            raise RefusedError(
                f"{one.run} goes on; another attempt would race with it",
                next=f"latentforge dispatch watch {one.run}   or   latentforge dispatch cancel {one.run}",
            )
        if run.role in needed and one.state.has_ended and not one.state.passed:
            return run.role
    last = planned[-1]
    if found[last.role].is_absent:
        raise RefusedError(
            f"there is no attempt of {last.run_id} to follow", next="the same command without --attempt next"
        )
    return last.role


def _chosen(
    planned: PlannedRun, found: _Found, resolved: dict[str, InputRef], *, again: bool, needed: bool
) -> ChosenRun:
    def chosen(
        will: RunWill, because: str, *, run: str = found.run, predecessor: str | None = None, anew: bool = False
    ) -> ChosenRun:
        identity = planned.identity.at_attempt(found.attempt + 1) if anew else found.identity
        return ChosenRun(
            kind=planned.role,
            run=identity.run_id if anew else run,
            identity=identity.canonical.decode(),
            kin=planned.kin,
            resolved=resolved,
            will=will,
            because=because,
            state=found.state,
            predecessor=predecessor,
        )

    state = found.state
    if again or (found.stale is not None and needed):
        if found.attempt >= MAX_ATTEMPTS:
            raise RefusedError(f"{found.run} is attempt {found.attempt}, the last that there can be")
        if found.stale is not None:
            return chosen("run", f"{found.run} passed, but {found.stale}", anew=True)
        # A canary begins at step 0 again: what it vouches for is the beginning.
        before = None if planned.is_canary else found.run
        return chosen("run", f"attempt {found.attempt + 1}, after {found.run}", predecessor=before, anew=True)
    if state.passed:
        return chosen("keep", f"passed {moment(state.ended)}")
    if state.going_on:
        return chosen("follow", "it goes on" if state.state != "unsupervised" else "it goes on without a supervisor")
    if state.has_ended and needed:
        return chosen("ended", told_end(state))
    if found.kin is not None:
        kept = chosen("keep", "already there; made by other code from the same spec", run=found.kin.id)
        return replace(kept, state=found.kin)
    if not needed:
        return chosen("keep", "not needed")
    resumes = found.attempt > 1 and not planned.is_canary
    predecessor = planned.identity.at_attempt(found.attempt - 1).run_id if resumes else None
    one = chosen("run", "reserved, never started" if state.state == "reserved" else "not there yet")
    return one if predecessor is None else _as(one, one.will, one.because, predecessor=predecessor)


def _as(one: ChosenRun, will: RunWill, because: str, *, predecessor: str | None = None) -> ChosenRun:
    return replace(one, will=will, because=because, predecessor=predecessor or one.predecessor)


def told_end(state: RunState) -> str:
    """How a run ended, in words."""
    when = f" {moment(state.ended)}" if state.ended else ""
    if state.state == "lost":
        return f"lost: {state.reason or 'its process is gone and left no exit record'}"
    if state.state == "interrupted":
        return f"interrupted: {state.reason or 'the host was restarted'}"
    if state.state in ("absent", "reserved"):
        return "was cancelled before it started"
    if state.outcome == "killed" and state.reason and state.class_ != "oom":
        return f"killed{when}: {state.reason}"  # by its supervisor, or with it: the signal is not what matters
    if state.outcome == "killed":
        why = {"oom": ", out of memory", "killed-unknown": ", cause unknown"}.get(state.class_ or "", "")
        return f"killed by signal {state.signal}{why}{when}"
    if state.class_ == "stopped":
        return f"stopped{when}: {state.reason}"
    if state.class_ == "not-started":
        return f"was not started: {state.reason}"
    if state.outcome == "crashed":
        return f"crashed with status {state.code}{when}"
    return f"{state.outcome or state.state}{when}"
