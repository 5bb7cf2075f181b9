"""From two hosts to one plan: the leader is asked as any host, the second one what it has of its part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dispatch.building.build import choose_build
from dispatch.building.warmup import choose_warmup
from dispatch.hosts.facts import HostFacts
from dispatch.pairing.beside import check_spread, following_runs, kin_of, spread, together
from dispatch.pairing.meeting import Side
from dispatch.places import Places
from dispatch.planning.ask import Ask
from dispatch.planning.memory import judge_memory
from dispatch.planning.plan import Plan, make_plan
from dispatch.planning.survey import survey, survey_beside
from dispatch.transport.call import Transport


def survey_both(
    transports: Sequence[Transport], asks: Sequence[Ask], places: Places
) -> tuple[Plan, tuple[HostFacts, HostFacts]]:
    """Probe both hosts and plan on them, with reading verbs alone: the plan of both, and what was seen of each."""
    check_spread(asks[0])
    plan, facts = survey(transports[0], asks[0], places)
    kins = [kin_of(run.run) for run, _ in spread(plan.runs)]
    there = _with_models(survey_beside(transports[1], asks[1], kins), facts)
    runs = following_runs(plan, there, asks[1].host.name)
    wanted = any(run.will == "run" for run in runs)
    build = choose_build(asks[1], there, wanted=wanted)
    second = make_plan(
        asks[1],
        there,
        runs,
        build=build,
        warmup=choose_warmup(asks[1], there, build, wanted=wanted),
        memory=judge_memory(asks[1], there),
    )
    sides = (Side(asks[0], facts), Side(replace(asks[1], notes=()), there))
    return together(sides, plan, second), (facts, there)


def _with_models(there: HostFacts, leader: HostFacts) -> HostFacts:
    """The second host's facts with the models as the leader has them: they are mirrored when the run begins."""
    if there.preflight is None or leader.preflight is None:
        return there
    preflight = there.preflight.model_copy(update={"models": leader.preflight.models})
    return there.model_copy(update={"preflight": preflight, "paths": leader.paths})
