"""One dispatch from the command line: plan, preview, apply, follow, conclude, and leave at any time."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING

from dispatch.apply import Applied, follow_chain, host_record, launch, refuse
from dispatch.building.build import NO_EVIDENCE, PREPARING
from dispatch.ends import RunEnd, ends_of, verdict_json
from dispatch.following.follow import Follower
from dispatch.following.limits import Limits
from dispatch.following.record import VERDICT_FILE, WatchEndedError
from dispatch.following.watching import PlainObserver, phase_lines
from dispatch.hosts.facts import HostFacts, RunState, moment
from dispatch.places import Places, check_evidence_folder
from dispatch.planning.applied import since_applied
from dispatch.planning.ask import Ask
from dispatch.planning.choice import told_end
from dispatch.planning.plan import Plan
from dispatch.planning.preview import ending, render
from dispatch.planning.survey import survey
from dispatch.records import plan_context, remember
from dispatch.transport.ahead import Ahead
from dispatch.transport.call import Transport
from dispatch.transport.open import open_transport
from dispatch.transport.retry import call
from latentforge.errors import RefusedError
from latentforge.verdicts import ExitCode

if TYPE_CHECKING:
    from dispatch.conclude import Conclusion
    from dispatch.following.live import LiveObserver


@dataclass
class Session:
    """A command that may follow a run; Ctrl-C at any moment leaves the run alone and says how to come back."""

    transport: Transport
    places: Places
    json: bool = False
    adjust: Callable[[Limits], Limits] = field(default=lambda limits: limits)
    observer: PlainObserver | LiveObserver = field(default=None)  # type: ignore[assignment]
    """Who shows the runs; chosen by what standard output is, where nobody is named."""
    tell: Callable[[str], None] | None = None
    """Takes the lines for people, where they share a terminal with those of other runs."""

    def __post_init__(self) -> None:
        if self.observer is None:
            self.observer = _observer(self.transport.host.name, self.json)
        self.follower = Follower(self.transport, self.places, self.observer, adjust=self.adjust)
        self.concluding: str | None = None

    def say(self, text: str) -> None:
        """A line for people."""
        if self.tell is not None:
            self.tell(text)
            return
        print(text, file=sys.stderr if self.json else sys.stdout, flush=True)

    def go(self, ask: Ask, *, detach: bool = False) -> ExitCode:
        """Plan, show, apply, and follow to the verdict."""
        check_evidence_folder(self.places)
        # What comes last is imported while the host answers what comes first.
        Ahead(lambda: import_module("dispatch.conclude"), lambda: None)
        try:
            plan, facts = self._survey(ask)
            since = since_applied(self.places, plan, ask)
            self.say(render(plan, ask, since))
            refuse(plan)
            if detach and plan.chain:
                plan = self._launch(plan, ask)
                return self._left(plan.chain[-1].run, "launched; it goes on by itself.", ExitCode.PASS)
            applied = self._apply(plan, ask)
            self.observer.close()
            self.concluding = applied.final
            return self._concluded(plan, ask, facts, applied)
        except WatchEndedError as ended:
            return self._stopped(ended)
        except KeyboardInterrupt:
            return self._detached(ask.command)
        finally:
            self.observer.close()

    def _survey(self, ask: Ask) -> tuple[Plan, HostFacts]:
        return survey(self.transport, ask, self.places)

    def _launch(self, plan: Plan, ask: Ask) -> Plan:
        return launch(plan, ask, self.transport, self.places, self.follower, say=self.say)

    def _apply(self, plan: Plan, ask: Ask) -> Applied:
        """Carry a plan out and follow it to its end."""
        return follow_chain(self._launch(plan, ask), self.follower)

    def _ends(self, plan: Plan, applied: Applied) -> list[RunEnd]:
        """How the runs of the pipeline ended."""
        return ends_of(plan.runs, applied.followed, self.observer.views, self.places, self.transport.host.name)

    def _code(self, code: ExitCode) -> ExitCode:
        """The exit code of the command where the run that decides earned ``code``."""
        return code

    def watch(self, run: str, chain: list[str], context: Mapping[str, object]) -> ExitCode:
        """Follow a run, and those of its chain that come before it, to the end; the exit code is the run's."""
        self.follower.goal = run
        try:
            state, last = self._watched(run, chain)
            self.observer.close()
            if state.state in ("absent", "reserved"):
                raise RefusedError(
                    f"{last} is {state.state} on {self.transport.host.name}: it was never started there",
                    next="latentforge dispatch go RECIPE",
                )
            if last.startswith(NO_EVIDENCE):
                return self._told(last, state, None)
            self.concluding = last
            from dispatch.conclude import conclude

            done = conclude(
                self.transport, last, state, self.places, plan=context, facts={"name": self.transport.host.name}
            )
            return self._code(self._told(last, state, done))
        except WatchEndedError as ended:
            return self._stopped(ended)
        except KeyboardInterrupt:
            return self._detached(f"latentforge dispatch watch {run}")
        finally:
            self.observer.close()

    def _watched(self, run: str, chain: list[str]) -> tuple[RunState, str]:
        """Follow a run and what is before it; the last state that was seen, and of which run."""
        upto = self._still_to_see(run, chain)
        state, last = RunState(state="absent"), run
        for position, one in enumerate(upto, start=1):
            state, last = self.follower.follow(one, position=position, of=len(upto)), one
            if not state.passed:
                break
        return state, last

    def _still_to_see(self, run: str, chain: list[str]) -> list[str]:
        """The run, and before it those of its chain that have not passed yet."""
        before = chain[: chain.index(run)] if run in chain else []
        states = call(self.transport, "status", {"runs": [*before, run]}).result
        if RunState.model_validate(states[run]).has_ended:
            return [run]
        return [*(one for one in before if not RunState.model_validate(states[one]).passed), run]

    def _concluded(self, plan: Plan, ask: Ask, facts: HostFacts, applied: Applied) -> ExitCode:
        from dispatch.conclude import conclude
        from latentforge.evidence.statement import MANIFEST

        # Finished, and no copy here: another clone's work, another laptop's, or that of a command that detached.
        adopted = not plan.chain and not (self.places.run(applied.final) / MANIFEST).is_file()
        done = conclude(
            self.transport,
            applied.final,
            applied.state,
            self.places,
            plan=plan_context(plan.digest, ask.recipe, ask.lane.as_json() if ask.lane else None),
            facts=host_record(ask, facts),
        )
        ends = self._ends(plan, applied)
        for line in phase_lines(self.observer.views):
            self.say(line)
        self.say("runs of the pipeline:")
        for end in ends:
            for line in end.lines() if end.run != done.run else end.lines()[:1]:  # its own verdicts come last
                self.say(line)
        if not plan.chain:
            when = f"(finished {moment(applied.state.ended)})"
            self.say(f"no changes. {applied.final} {applied.state.outcome or applied.state.state}  {when}")
            remember(self.places, ask.host, [applied.final], recipe=ask.recipe, plan=plan.digest)
        if adopted:
            self.say(
                f"adopted: an earlier dispatch to {ask.host.name} finished {applied.final}; nothing was trained now"
            )
        code = self._code(self._told(applied.final, applied.state, done, again=f"{ask.command} --attempt next"))
        if self.json:
            print(json.dumps(_as_json(plan, ends, done, applied.state, code), indent=2))
        return code

    def _told(self, run: str, state: RunState, done: Conclusion | None, *, again: str | None = None) -> ExitCode:
        if not state.passed:
            step = self.observer.views[run].last.get("step") if run in self.observer.views else None
            where = f" at step {step}" if step is not None else ""
            why = f": {done.reason}" if done and done.reason else ""
            # A failed falsifier is a result, not an error; a failure without one says why itself.
            self.say("error: " * (state.outcome != "fail") + f"{run} {told_end(state)}{where}{why}")
            if again:
                # The same question gets the same refusal, unless its cause was the host's.
                refused = "put that right; if nothing in the pipeline changes with it, " * (state.outcome == "refused")
                self.say(
                    f"  next: read its log:  latentforge dispatch watch {run}\n        {refused}run it again:  {again}"
                )
        for line in done.lines() if done else []:
            self.say(line)
        if done:
            return done.code
        from dispatch.conclude import earned_code

        return earned_code(state)

    def _stopped(self, ended: WatchEndedError) -> ExitCode:
        """Say why there is nothing to wait for; the run itself is left alone."""
        self.observer.close()
        record = ended.record
        for verdict in record.verdicts:
            self.say(verdict.line())
        evidence = self.places.followed(self.transport.host.name, record.run) / VERDICT_FILE
        first, *rest = (ended.next or "").splitlines()
        self.say("\n".join([f"  the run was left alone; noted in {evidence}", f"  next: {first}"]))
        for line in rest:
            self.say(f"        {line}")
        if self.json:
            print(json.dumps({"run": record.run, "watch": record.as_json(), "code": int(ended.code)}, indent=2))
        return ended.code

    def _detached(self, again: str) -> ExitCode:
        self.observer.close()
        run = self.follower.goal
        if self.concluding is not None:
            self.say(f"\nstopped while collecting {self.concluding}; nothing is lost.   again:  {again}")
            return ExitCode.DETACHED
        if run is not None and run.startswith(PREPARING):
            what = run.partition("-")[0]
            self.say(f"\ndetached; the {what} goes on, and nothing else was launched yet.   again:  {again}")
            return ExitCode.DETACHED
        if run is not None:
            return self._left(run, "\ndetached; the run goes on.", ExitCode.DETACHED)
        # A launch that was under way may have been done all the same: only the host can say, when it is asked again.
        self.say(f"\nstopped before a launch was confirmed; what was done is found and kept.   again:  {again}")
        return ExitCode.DETACHED

    def _left(self, run: str, how: str, code: ExitCode) -> ExitCode:
        where = run if self.places.record(run).is_file() else f"{run} --host {self.transport.host.name}"
        self.say(f"{how}   back:  latentforge dispatch watch {where}     stop:  latentforge dispatch cancel {where}")
        return code


def _observer(host: str, as_json: bool) -> PlainObserver | LiveObserver:
    if as_json or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        # With --json standard output is for programs; the run's lines go to people on the other stream.
        return PlainObserver(host, sys.stderr if as_json else None)
    from dispatch.following.live import LiveObserver  # rich is slow to import, and not needed in a pipe

    return LiveObserver(host)


def preview(ask: Ask, places: Places, *, as_json: bool, transport: Transport | None = None) -> ExitCode:
    """Show the plan over a transport that only reads (one of its own, or the caller's); nothing is changed anywhere."""
    check_evidence_folder(places)
    own = transport or open_transport(ask.host, places, readonly=True)
    assert own.readonly
    try:
        plan, _facts = survey(own, ask, places)
    finally:
        own.close()
    return show_preview(plan, ask, places, as_json=as_json)


def show_preview(plan: Plan, ask: Ask, places: Places, *, as_json: bool) -> ExitCode:
    """Show a plan that is not carried out; the code of what refuses it."""
    since = since_applied(places, plan, ask)
    if as_json:
        print(json.dumps({**plan.as_json(), "since": since.as_json() if since else None}, indent=2))
    else:
        print(render(plan, ask, since))
        print(ending(plan, ask))
    return plan.refusals[0].code if plan.refusals else ExitCode.PASS


def _as_json(
    plan: Plan, ends: Sequence[RunEnd], done: Conclusion, state: RunState, code: ExitCode
) -> dict[str, object]:
    return {
        **plan.as_json(),
        "ends": [one.as_json() for one in ends],
        "run": done.run,
        "state": state.model_dump(mode="json"),
        "verdicts": [verdict_json(one) for one in done.verdicts],
        "manifest": done.manifest,
        "problems": done.problems,
        "code": int(code),
    }
