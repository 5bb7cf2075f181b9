"""The second host's part of a plan: its build, its warm-up, and a run that follows each one that both hosts share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from dispatch.hosts.facts import HostFacts, RunState
from dispatch.pairing.meeting import Side, judge_meeting, port_of
from dispatch.planning.ask import Ask
from dispatch.planning.choice import MAX_ATTEMPTS, ChosenRun, RunWill, told_end
from dispatch.planning.plan import Plan, Refusal
from latentforge.errors import RefusedError
from latentforge.spec.canonical import canonical_sha256
from latentforge.spec.hosts import check_hosts, following
from latentforge.spec.identity import RunIdentity
from latentforge.spec.spread import processes_of

HOSTS = 2


def spread(runs: Sequence[ChosenRun]) -> Iterator[tuple[ChosenRun, RunIdentity]]:
    """Those runs that train in several processes, with what they mean: the ones that two hosts share."""
    for one in runs:
        identity = RunIdentity.from_bytes(one.identity.encode())
        if processes_of(identity.kind, identity.spec) is not None:
            yield one, identity


def check_spread(ask: Ask) -> None:
    """Refuse a pipeline of which no stage, or a part of a stage, could be shared between two hosts."""
    spec = ask.spec
    sections = {
        "autoencoder": spec.through != "distill",
        "distill": spec.distils,
        "latent": spec.through == "latent",
    }
    trained = [kind for kind, wanted in sections.items() if wanted]
    asked = spec.model_dump(mode="json")
    shared = [kind for kind in trained if processes_of(kind, asked) is not None]
    if not shared:
        names = ",".join(ask.hosts)
        first = f"--set {trained[0]}.distributed=fsdp2   trains on both\n" if trained else ""
        raise RefusedError(
            f"--host {names!r}: no stage of {ask.recipe} is spread over processes (distributed = none), so nothing of "
            f"it can run on two hosts",
            next=f"{first}one of them, the first that is fit:  --lanes {names}\nthe same on each:  --each {names}",
        )
    for kind in shared:
        check_hosts(kind, asked, HOSTS)


def kin_of(leader: str) -> str:
    """What all runs have in common that follow one leader's run."""
    return canonical_sha256({"kind": "follow", "follows": leader})


def following_runs(plan: Plan, there: HostFacts, host: str) -> list[ChosenRun]:
    """For each run of the leader's plan that is spread, the one on the second host that follows it.

    One that ended is never started again while its leader still needs it: a further attempt is.
    """
    found = []
    for leader, identity in spread(plan.runs):
        kin = kin_of(leader.run)
        states: Mapping[str, RunState] = {one.id: one for one in there.kin_runs.get(kin, ())}
        own = following(identity, 1)
        wanted = leader.will in ("run", "follow")
        ended = ""
        for number in range(own.attempt, own.attempt + MAX_ATTEMPTS):
            own = own.at_attempt(number)
            state = states.get(own.run_id, RunState(state="absent"))
            if not (wanted and state.has_ended):
                break
            ended = f"an earlier one {told_end(state)}; "
        will: RunWill = "keep" if not wanted else "follow" if state.going_on else "run"
        because = f"not needed: {leader.run} is not trained now" if not wanted else f"{ended}with {leader.run}"
        if will == "run":
            because += f", met at port {port_of(leader.run)} of the link"
        found.append(
            ChosenRun(
                kind=f"follow {leader.kind}",
                run=own.run_id,
                identity=own.canonical.decode(),
                kin=kin,
                resolved={"leader": {"run": leader.run}},
                will=will,
                because=because,
                state=state,
            )
        )
    return found


def together(sides: Sequence[Side], leader: Plan, second: Plan) -> Plan:
    """One plan of both: the leader's, with the second host's steps, refusals and notes in it."""
    first_host, second_host = (side.name for side in sides)
    meeting, refusals, notes = judge_meeting(sides)
    alone = [*_alone(sides, leader)]
    own = [replace(step, name=f"{second_host}: {step.name}") for step in second.steps]
    runs = {f"{second_host}: {run.kind}" for run in second.runs}
    before = [step for step in own if step.name not in runs][: -len(_AFTER)]
    at = next(number for number, step in enumerate(leader.steps) if step.name == leader.runs[0].kind)
    end = len(leader.steps) - len(_AFTER)
    steps = [*leader.steps[:at], meeting, *before, *leader.steps[at:end]]
    steps += [*(step for step in own if step.name in runs), *leader.steps[end:]]
    named = [*_of_host(first_host, leader.refusals), *refusals, *alone, *_of_host(second_host, second.refusals)]
    return replace(
        leader,
        steps=tuple(steps),
        refusals=tuple(named),
        notes=(*leader.notes, *notes),
        busy=leader.busy or second.busy,
        beside=second,
    )


_AFTER = ("follow", "collect", "evidence")
"""The steps that end a plan; the second host has nothing to collect."""


def _alone(sides: Sequence[Side], plan: Plan) -> Iterator[Refusal]:
    """Runs that go on over other hosts than are asked for: the second host has no place in them."""
    asked = tuple(side.name for side in sides)
    known = {one.id: one for rows in sides[0].facts.kin_runs.values() for one in rows}
    for run, _ in spread(plan.runs):
        there = known.get(run.run)
        if run.will == "follow" and there is not None and there.hosts != asked:
            where = ",".join(there.hosts) or asked[0]
            yield Refusal(
                f"{run.run} goes on on {where}, not over {' and '.join(asked)}",
                f"latentforge dispatch watch {run.run}   or, to begin again over both:  "
                f"latentforge dispatch cancel {run.run}",
            )


def _of_host(host: str, refusals: Sequence[Refusal]) -> Iterator[Refusal]:
    for one in refusals:
        yield one if host in one.why else replace(one, why=f"{host}: {one.why}")
