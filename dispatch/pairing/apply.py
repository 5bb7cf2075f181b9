"""Launching a run over two hosts: both are prepared at once, both parts reserved, the follower launched first."""

from __future__ import annotations

import contextlib
import getpass
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dispatch.apply import build, context_of, launch_chain, pull_models, refuse, reserve, same_judgements, warm_up
from dispatch.following.follow import Follower
from dispatch.hosts.facts import HostFacts
from dispatch.lanes.each import each
from dispatch.pairing.beside import spread
from dispatch.pairing.meeting import Side, world_of
from dispatch.pairing.survey import survey_both
from dispatch.places import Places
from dispatch.planning.applied import keep_applied
from dispatch.planning.ask import Ask
from dispatch.planning.plan import Plan
from dispatch.records import Beside, remember
from dispatch.transport.call import Transport
from dispatch.transport.retry import call
from latentforge.errors import LatentForgeError
from latentforge.spec.endurance import carriage_of


@dataclass(frozen=True)
class End:
    """One of the two hosts as a command works with it."""

    ask: Ask
    transport: Transport
    follower: Follower


def launch_both(plan: Plan, ends: Sequence[End], places: Places, *, say: Callable[[str], None]) -> Plan:
    """Do everything up to the moment at which the runs of both hosts go on by themselves; the plan acted upon."""
    refuse(plan)
    leader = ends[0]
    assert plan.beside is not None
    if not plan.starts_something:
        if plan.chain:
            leader.follower.goal = plan.chain[-1].run
            note_both(plan, ends, places)
        return plan
    shown = plan
    plan, facts = survey_both([one.transport for one in ends], [one.ask for one in ends], places)
    same_judgements(shown, plan, leader.ask)
    refuse(plan)
    if not plan.chain:
        return plan
    _prepare(plan, ends, facts, say)
    if any(pull.will != "keep" for pull in plan.pulls):
        pull_models(plan, leader.ask, facts[0], leader.transport, places, leader.follower, say=say)
    note_both(plan, ends, places)  # before the launch: if its reply is lost, the runs can still be found by their names
    _start(plan, ends, facts)
    leader.follower.goal = plan.chain[-1].run  # from here on a command that is stopped leaves runs that go on
    keep_applied(places, plan, leader.ask)
    return plan


def note_both(plan: Plan, ends: Sequence[End], places: Places) -> None:
    """Note the runs of both hosts, each of the leader's with those that follow it."""
    leader, second = ends
    assert plan.beside is not None
    following = [one.run for one in plan.beside.chain]
    context = context_of(leader.ask, plan)
    host = second.ask.host
    beside = Beside(host.name, host.root, host.user, tuple(following)) if following else None
    remember(places, leader.ask.host, [one.run for one in plan.chain], beside=beside, **context)
    remember(places, host, following, **context)


def _prepare(plan: Plan, ends: Sequence[End], facts: Sequence[HostFacts], say: Callable[[str], None]) -> None:
    """Build and warm up on both hosts at once; raises the error of the one that did not come to be ready."""
    plans = {plan.host: plan, **({plan.beside.host: plan.beside} if plan.beside is not None else {})}
    found = {one.ask.host.name: (one, facts[number]) for number, one in enumerate(ends)}

    def work(name: str) -> None:
        (end, seen), part = found[name], plans[name]
        end.transport.install()
        if part.build is not None:
            build(part.build, end.ask, seen, end.transport, end.follower, plan=plan.digest, say=say)
        if part.warmup is not None:
            warm_up(part.warmup, end.ask, seen, end.transport, end.follower, part)

    for result in each([one.ask.host for one in ends], lambda host: work(host.name)).values():
        if result.error is not None:
            raise result.error


def _start(plan: Plan, ends: Sequence[End], facts: Sequence[HostFacts]) -> None:
    """Reserve and launch: the second host first, since what refuses it there is met before the leader begins."""
    leader, second = ends
    assert plan.beside is not None
    sides = [Side(one.ask, seen) for one, seen in zip(ends, facts, strict=True)]
    spec = leader.ask.spec.endurance
    shared = {one.run for one, _ in spread(plan.runs)}
    for one in plan.beside.chain:
        if one.will == "run":
            world = world_of(sides, 1, one.resolved["leader"]["run"])
            more = {"world": world, "resolved": {}, "endurance": carriage_of(spec), "restarts": spec.restarts}
            reserve(one, second.ask, facts[1], plan.beside, second.transport, more=more)
    for one in plan.chain:
        if one.will == "run":
            more = {"world": world_of(sides, 0, one.run)} if one.run in shared else {}
            reserve(one, leader.ask, facts[0], plan, leader.transport, more=more)
    if following := [one.run for one in plan.beside.chain]:
        launch_chain(following, second.ask, second.transport, second.follower, plan.beside)
    try:
        launch_chain([one.run for one in plan.chain], leader.ask, leader.transport, leader.follower, plan)
    except LatentForgeError:
        cancel_following(second.transport, following)
        raise


def cancel_following(transport: Transport, runs: Sequence[str]) -> list[str]:
    """End runs that have nobody to follow any more; those of which it is known that nothing of them is left."""
    ended = []
    for run in reversed(runs):  # the last first: else it would be started when the one before it is gone
        with contextlib.suppress(LatentForgeError):  # their own bound ends them where this does not
            done = call(transport, "cancel", {"run": run, "by": getpass.getuser()}, timeout=120.0).result
            if not done["survivors"]:
                ended.append(run)
    return ended
