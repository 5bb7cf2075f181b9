"""Asking every lane for the runs of a plan before anything is launched on one of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from dispatch.hosts.facts import RunState
from dispatch.lanes.choose import LaneSeen, choose_lane
from dispatch.lanes.each import each
from dispatch.places import Places
from dispatch.planning.ask import Ask
from dispatch.planning.choice import MAX_ATTEMPTS
from dispatch.planning.plan import Plan
from dispatch.planning.survey import survey
from dispatch.records import recorded
from dispatch.transport.link import HostKeyError
from dispatch.transport.open import open_transport
from dispatch.transport.retry import call
from latentforge.errors import LatentForgeError, TransportError, UnknownOutcomeError
from latentforge.spec.identity import RunIdentity
from latentforge.spec.pipeline import external_paths, pipeline_runs


def ask_for_lane(asks: Sequence[Ask], places: Places, *, abandon: bool) -> Ask:
    """The request for the lane that takes the run; all lanes are asked at once, over transports that only read."""
    by_host = {ask.host.name: ask for ask in asks}

    def look(host_name: str) -> Plan:
        ask = by_host[host_name]
        transport = open_transport(ask.host, places, readonly=True)
        try:
            return survey(transport, ask, places)[0]
        finally:
            transport.close()

    found = each([ask.host for ask in asks], lambda host: look(host.name))
    plans = [one.value for one in found.values() if one.value is not None]
    ids = {run for plan in plans for run in _attempts(plan.runs[-1].identity)}
    unplanned = {name: ids | set(_own(by_host[name])) for name, one in found.items() if one.value is None}

    def standing(host_name: str) -> dict[str, RunState]:
        transport = open_transport(by_host[host_name].host, places, readonly=True)
        try:
            answer = call(transport, "status", {"runs": sorted(unplanned[host_name])}).result
        finally:
            transport.close()
        return {run: RunState.model_validate(state) for run, state in answer.items()}

    # One that was reached and cannot be planned on (a model's folder is missing there) can still say what it has.
    answering = [by_host[name].host for name in unplanned if ids and not _away(found[name].error)]
    states = each(answering, lambda host: standing(host.name)) if answering else {}
    seen = []
    for name, one in found.items():
        given = _given(places, by_host[name], unplanned.get(name, ids))
        said = states[name].value if name in states else None
        seen.append(LaneSeen(name, one.value, _clean(one.error), given, said))
    choice = choose_lane(seen, abandon=abandon, command=asks[0].command)
    chosen = by_host[choice.chosen]
    command = chosen.command + " --abandon" * (abandon and any(lane.open for lane in seen))
    return replace(chosen, lane=choice, command=command)


def _away(error: LatentForgeError | None) -> bool:
    return isinstance(error, TransportError | UnknownOutcomeError)


def _given(places: Places, ask: Ask, ids: Iterable[str]) -> str | None:
    """A run of the plan that this laptop has noted as given to that host."""
    wanted = set(ids)
    return next((one.run for one in recorded(places) if one.host == ask.host.name and one.run in wanted), None)


def _attempts(identity: str) -> list[str]:
    first = RunIdentity.from_bytes(identity.encode())
    return [first.at_attempt(number).run_id for number in range(1, MAX_ATTEMPTS + 1)]


def _own(ask: Ask) -> list[str]:
    """The ids of the last run as that lane's own lock file gives them, where they do not depend on files there."""
    if list(external_paths(ask.spec)):
        return []
    last = pipeline_runs(ask.spec, digests={}, code=ask.code, lock=ask.lock)[-1]
    return _attempts(last.identity.canonical.decode())


def _clean(error: LatentForgeError | None) -> LatentForgeError | None:
    """A host key that changed is no lane that happens to be away: it is told, and nothing is sent elsewhere."""
    if isinstance(error, HostKeyError):
        raise error
    return error
