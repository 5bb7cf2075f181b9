"""Applying a plan: build, reserve, launch, follow. Each step is idempotent, so the same plan twice is one run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from dispatch.building.build import BuildChoice, build_program
from dispatch.building.warmup import WarmUp
from dispatch.following.follow import Follower
from dispatch.hosts.facts import HostFacts, RunState
from dispatch.places import Places
from dispatch.planning.applied import keep_applied
from dispatch.planning.ask import Ask
from dispatch.planning.choice import ChosenRun
from dispatch.planning.plan import Plan
from dispatch.planning.runner import choose_runner
from dispatch.planning.secrets import values
from dispatch.planning.survey import survey
from dispatch.preparing import Preparation, finish, start
from dispatch.records import remember
from dispatch.transport.call import Transport
from dispatch.transport.retry import call
from dispatch.transport.sending import send
from latentforge.errors import BusyError, LatentForgeError, RefusedError
from latentforge.spec.endurance import TRAINING, carriage_of
from latentforge.spec.teacher import ASKING, reach_of

# A change of judgement that takes nothing away from what was shown: somebody else did the step meanwhile.
_HARMLESS = {("run", "follow"), ("run", "keep"), ("send", "keep"), ("follow", "keep"), ("write", "keep")}
_PASSED_ON = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE")


@dataclass(frozen=True)
class Applied:
    """What became of a plan: the run that decides, its last state, and the state of each run that was followed."""

    final: str
    state: RunState
    followed: dict[str, RunState]


def refuse(plan: Plan) -> None:
    """Raise what stands against a plan, if anything does."""
    if plan.refusals:
        first = plan.refusals[0]
        raise LatentForgeError(first.why, next=first.next, code=first.code)


def follow_chain(plan: Plan, follower: Follower) -> Applied:
    """Follow what a plan has launched to its end."""
    followed: dict[str, RunState] = {}
    chain = plan.chain
    for position, one in enumerate(chain, start=1):
        state = follower.follow(one.run, position=position, of=len(chain))
        followed[one.run] = state
        if not state.passed:
            return Applied(one.run, state, followed)
    if chain:
        return Applied(chain[-1].run, followed[chain[-1].run], followed)
    final = plan.final
    assert final.state is not None
    return Applied(final.run, final.state, followed)


def launch(
    plan: Plan, ask: Ask, transport: Transport, places: Places, follower: Follower, *, say: Callable[[str], None]
) -> Plan:
    """Do everything up to the moment at which the runs go on by themselves; returns the plan acted upon.

    A plan that starts nothing is not asked about again: what goes on or has ended is followed or reported as it is.
    """
    refuse(plan)
    if not plan.starts_something:
        if plan.chain:
            follower.goal = plan.chain[-1].run
            remember(places, ask.host, [one.run for one in plan.chain], **context_of(ask, plan))
        return plan
    shown = plan
    plan, facts = survey(transport, ask, places)
    same_judgements(shown, plan, ask)
    refuse(plan)
    if not plan.chain:
        return plan
    transport.install()
    if plan.build is not None:
        build(plan.build, ask, facts, transport, follower, plan=plan.digest, say=say)
    if plan.warmup is not None:
        warm_up(plan.warmup, ask, facts, transport, follower, plan)
    if any(pull.will != "keep" for pull in plan.pulls):
        pull_models(plan, ask, facts, transport, places, follower, say=say)
    if any(one.will == "run" for one in plan.chain):
        # Noted before the launch: if the reply is lost, the run can still be found by its name.
        remember(places, ask.host, [one.run for one in plan.chain], **context_of(ask, plan))
        for one in plan.chain:
            if one.will == "run":
                reserve(one, ask, facts, plan, transport)
        launch_chain([one.run for one in plan.chain], ask, transport, follower, plan)
    follower.goal = plan.chain[-1].run  # from here on a command that is stopped leaves a run that goes on
    remember(places, ask.host, [one.run for one in plan.chain], **context_of(ask, plan))
    keep_applied(places, plan, ask)
    return plan


def pull_models(
    plan: Plan,
    ask: Ask,
    facts: HostFacts,
    transport: Transport,
    places: Places,
    follower: Follower,
    *,
    say: Callable[[str], None],
) -> None:
    """Bring the models, and look at them on the host as at any folder before a run is given one."""
    from dispatch.pulling.pull import perform

    for one in plan.pulls:
        perform(one, facts, transport, places, follower, say=say)
    now, _facts = survey(transport, ask, places)
    if [run.run for run in now.runs] != [run.run for run in plan.runs]:
        raise RefusedError(f"the models on {ask.host.name} are others than those that were planned", next=ask.command)


def context_of(ask: Ask, plan: Plan) -> dict[str, Any]:
    """What is noted of a plan beside each of its runs."""
    lanes = ask.lane.as_json() if ask.lane is not None else None
    return {"recipe": ask.recipe, "plan": plan.digest, "lanes": lanes}


def build(
    choice: BuildChoice,
    ask: Ask,
    facts: HostFacts,
    transport: Transport,
    follower: Follower,
    *,
    plan: str | None,
    say: Callable[[str], None],
) -> None:
    """Send the code and build it on the host, as a run of its own, unless that has been done."""
    if choice.will == "keep":
        return
    prepared = Preparation(
        run=choice.run,
        kin=choice.names.kin,
        identity=choice.identity,
        told=f"the build {choice.run} on {ask.host.name} did not succeed",
        next=_again(choice.run, ask),
    )
    if choice.will == "run":
        assert ask.bundle is not None
        runner = choose_runner(ask.host, facts)
        program, sha256 = build_program()
        if not choice.bundle_there:
            say(f"sending {ask.code_label}, {ask.bundle.size / 1e6:.1f} MB")
            send(transport, ask.bundle.sha256, ask.bundle.content)
        send(transport, sha256, program)
        what = {
            "argv": choice.argv(ask, facts),
            "env": {"PYTHONUNBUFFERED": "1"},
            "plan": plan,
            "host": host_record(ask, facts),
            **runner.launch_fields(),
        }
        start(replace(prepared, launch=what), transport, runner=runner.asked)
    finish(prepared, follower)


def warm_up(one: WarmUp, ask: Ask, facts: HostFacts, transport: Transport, follower: Follower, plan: Plan) -> None:
    """Prove the kernels of a build on its host, as a run that holds the device, unless that has been done."""
    assert plan.build is not None
    if one.will == "keep":
        return
    prepared = Preparation(
        run=one.run,
        kin=one.kin,
        identity=one.identity,
        told=f"the kernels' warm-up {one.run} on {ask.host.name} did not pass",
        next=_again(one.run, ask),
        launch={
            "argv": one.argv(plan.build.python(facts.root)),
            "env": {"PYTHONUNBUFFERED": "1", "PYTHONPATH": plan.build.site(facts.root)},
            "lease": ["device"],
            "plan": plan.digest,
            "host": host_record(ask, facts),
            **plan.runner.launch_fields(),
        },
    )
    if one.will == "run":
        start(prepared, transport, runner=plan.runner.asked, wait_lease=ask.wait)
    finish(prepared, follower)


def _again(run: str, ask: Ask) -> str:
    """What to do about a run that prepared nothing."""
    return (
        f"read its log:  latentforge dispatch watch {run} --host {ask.host.name}\nthen:  {ask.command} --attempt next"
    )


def reserve(
    one: ChosenRun,
    ask: Ask,
    facts: HostFacts,
    plan: Plan,
    transport: Transport,
    *,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Reserve a run with everything that starting it takes, ``more`` in place of what else would be written; nothing of
    it is looked up again later."""
    argv, env = job(one, facts, plan)
    record: dict[str, Any] = {
        "run": one.run,
        "kin": one.kin,
        "resolved": _located(one, plan),
        "predecessor": one.predecessor,
        "reach": reach_of(ask.spec.teacher) if one.kind in ASKING else {},
        "endurance": carriage_of(ask.spec.endurance) if one.kind in TRAINING else {},
        "restarts": ask.spec.endurance.restarts if one.kind in TRAINING else 0,
        "argv": argv,
        "env": env,
        "lease": [] if one.kind == "data" else ["device"],
        "plan": plan.digest,
        "host": host_record(ask, facts),
        **plan.runner.launch_fields(),
        **more,
    }
    args = {"run": one.run, "identity": one.identity, "launch": record}
    if names := sorted(ask.spec.secrets):
        record["secrets"] = names
        args["secrets"] = values(names, os.environ)
    call(transport, "reserve", args)


def _located(one: ChosenRun, plan: Plan) -> dict[str, Any]:
    """The inputs of a run, with each pinned model's place on its host."""
    places = {str(pull.ref): pull.path for pull in plan.pulls}
    return {
        name: {**ref, "path": places[ref["path"]]} if ref.get("path") in places else dict(ref)
        for name, ref in one.resolved.items()
    }


def job(one: ChosenRun, facts: HostFacts, plan: Plan) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of a run's process."""
    env = {"PYTHONUNBUFFERED": "1"}
    if plan.build is None:
        python = sys.executable
        env |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    else:
        python = plan.build.python(facts.root)
        env["PYTHONPATH"] = plan.build.site(facts.root)
    # -P: a folder that happens to be current must not shadow the package.
    return [python, "-P", "-m", "latentforge", "run", f"{facts.root}/runs/{one.run}"], env


def host_record(ask: Ask, facts: HostFacts) -> dict[str, Any]:
    """What is kept of the host beside a run: who it is, not how busy it was."""
    host = facts.host
    record: dict[str, Any] = {"name": ask.host.name, "hostname": host.hostname, "arch": host.arch, "os": host.os}
    record |= {"cpu": host.cpu, "cores": host.cores, "kernel": host.kernel, "driver": host.driver}
    return record | {"boot_id": host.boot_id, **({"waived": dict(ask.waived)} if ask.waived else {})}


def launch_chain(chain: list[str], ask: Ask, transport: Transport, follower: Follower, plan: Plan) -> None:
    """Start reserved runs in order; where another chain has the first of them, after that with ``--wait``."""
    args = {"chain": chain, "wait_lease": ask.wait, "runner": plan.runner.asked}
    try:
        call(transport, "launch", args, timeout=90.0)
    except BusyError:
        leading = [one.run for one in plan.chain if one.will == "follow"]
        if not (ask.wait and leading):
            raise
        # The first runs belong to another chain, which shares them with ours: wait for those, then go on from there.
        for run in leading:
            if not follower.follow(run).passed:
                raise
        call(transport, "launch", args, timeout=90.0)


def same_judgements(shown: Plan, now: Plan, ask: Ask) -> None:
    """Refuse a plan that takes something away from the one that was shown."""
    before = {step.name: step for step in shown.steps}
    changed: list[str] = []
    for step in now.steps:
        was = before.pop(step.name, None)
        same_run = was is not None and (was.run == step.run or step.name not in {one.kind for one in now.runs})
        if was is None and step.will not in ("keep", "check"):
            changed.append(f"{step.name} was not needed, is now {step.will!r} ({step.because})")
        elif was is not None and (was.will != step.will or not same_run) and (was.will, step.will) not in _HARMLESS:
            changed.append(f"{step.name} was {was.will!r}, is now {step.will!r} ({step.because})")
    if now.starts_something:
        # What was to prove or bring something must not be left out unseen: a GPU that went takes its warm-up along.
        changed += [f"{name} was {was.will!r}, is now left out" for name, was in before.items() if was.will != "keep"]
        if now.runner.name != shown.runner.name:
            changed.append(f"the runner was {shown.runner.name}, is now {now.runner.name} ({now.runner.why})")
    if changed:
        raise RefusedError(f"{ask.host.name} changed since the plan was shown: {changed[0]}", next=ask.command)
