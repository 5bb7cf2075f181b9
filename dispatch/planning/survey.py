"""From a host to a plan: ask what there is, no more often than needed, and hand it to the planner."""

from __future__ import annotations

from dispatch.building.build import BuildNames, choose_build
from dispatch.hosts.facts import HostFacts
from dispatch.places import Places
from dispatch.planning.ask import Ask
from dispatch.planning.choice import attempt_ids, choose
from dispatch.planning.memory import judge_memory
from dispatch.planning.plan import Plan, make_plan
from dispatch.transport.call import Transport
from dispatch.transport.retry import call
from latentforge.errors import RefusedError
from latentforge.spec.pipeline import PlannedRun, external_paths, pipeline_runs

PROBE_SECONDS = 60.0


def survey(transport: Transport, ask: Ask, places: Places) -> tuple[Plan, HostFacts]:
    """Probe a host and plan on it. Only reading verbs are used.

    Two questions where the pipeline names files of the user's (their digests go into the runs' ids), else one; one more
    where a run has later attempts.
    """
    digests = _digests(transport, ask)
    planned = pipeline_runs(ask.spec, digests=digests, code=ask.code, lock=ask.lock)
    names = BuildNames.of(ask) if ask.bundle is not None else None
    facts = _probe(transport, ask, planned, names)
    build = None
    runs = choose(planned, facts, attempt_next=False)
    if names is not None:
        build = choose_build(ask, facts, wanted=any(run.will == "run" for run in runs))
    if ask.attempt_next and not (build and build.again):
        runs = choose(planned, facts, attempt_next=True)
        if build is not None:
            build = choose_build(ask, facts, wanted=True)
    plan = make_plan(ask, facts, runs, build=build, memory=judge_memory(ask, facts), copied=_copied(places))
    return plan, facts


def _digests(transport: Transport, ask: Ask) -> dict[str, str]:
    wanted = list(external_paths(ask.spec))
    if not wanted:
        return {}
    paths = [{"path": one.path, "purpose": one.purpose} for one in wanted]
    facts = HostFacts.model_validate(call(transport, "probe", {"paths": paths}, timeout=600.0).result)
    digests: dict[str, str] = {}
    for one in wanted:
        found = facts.paths.get(one.path)
        if found is None or not found.ok or found.sha256 is None:
            why = (found.reason if found else None) or "it could not be read"
            raise RefusedError(
                f"{one.field} = {one.path!r}: {why} (on {ask.host.name})", next=(found.next if found else None)
            )
        digests[one.path] = found.sha256
    return digests


def _probe(transport: Transport, ask: Ask, planned: list[PlannedRun], names: BuildNames | None) -> HostFacts:
    kins = [run.kin for run in planned]
    wanted = [{"id": run.run_id, "kin": run.kin} for run in planned]
    question: dict[str, object] = {"kins": kins, "runs": wanted}
    if names is not None:
        assert ask.bundle is not None
        wanted.append({"id": names.identity.run_id, "kin": names.kin})
        kins.append(names.kin)
        question |= {"builds": [names.build], "venvs": [names.venv], "cas": [ask.bundle.sha256]}
    facts = HostFacts.model_validate(call(transport, "probe", question, timeout=PROBE_SECONDS).result)
    later = [run for one in planned for run in attempt_ids(one, facts.kin_runs.get(one.kin, ()))]
    if names is not None:
        present = {kin.id for kin in facts.kin_runs.get(names.kin, ())}
        later += [run for run in names.attempt_ids()[1:] if run in present]
    if later:
        states = call(transport, "status", {"runs": later}).result
        merged = {**{run: state.model_dump() for run, state in facts.runs.items()}, **states}
        facts = HostFacts.model_validate({**facts.model_dump(), "runs": merged})
    return facts


def _copied(places: Places) -> frozenset[str]:
    return frozenset(path.parent.name for path in places.evidence.glob("*/manifest.json"))
