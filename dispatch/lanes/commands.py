"""What can be asked of several hosts at once: their builds, their runs, and the copies of those that finished."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from dispatch.building.build import NO_EVIDENCE
from dispatch.building.only import Built, build_only
from dispatch.collect import Collected, collect
from dispatch.conclude import worst
from dispatch.following.follow import Follower
from dispatch.following.watching import PlainObserver
from dispatch.hosts.facts import RunState
from dispatch.hosts.inventory import Host
from dispatch.lanes.streams import host_stream
from dispatch.places import Places
from dispatch.planning.ask import Ask
from dispatch.planning.choice import told_end
from dispatch.records import Record
from dispatch.transport.open import open_transport
from dispatch.transport.retry import call
from latentforge.errors import LatentForgeError
from latentforge.verdicts import ExitCode


@dataclass(frozen=True)
class Standing:
    """The runs that this laptop gave a host, as they are now."""

    runs: Mapping[str, RunState]

    def lines(self) -> str:
        """A run a line."""
        if not self.runs:
            return "no run was dispatched to it from this laptop"
        return "\n".join(
            f"{run:<30}  {told_end(state) if state.has_ended else state.state}" for run, state in self.runs.items()
        )


@dataclass(frozen=True)
class Gathered:
    """What was copied from a host: finished runs, and those that could not be copied with the reason."""

    copies: Mapping[str, Collected]
    failed: Mapping[str, LatentForgeError]
    going_on: tuple[str, ...]

    @property
    def code(self) -> ExitCode:
        """The worst of its runs."""
        return worst([error.code for error in self.failed.values()])

    def lines(self) -> str:
        """A run a line."""
        lines = [
            f"{run:<30}  {one.files} files, {one.bytes / 1e6:.1f} MB{one.told}" for run, one in self.copies.items()
        ]
        lines += [f"{run:<30}  error: {error}" for run, error in self.failed.items()]
        lines += [f"{run:<30}  goes on" for run in self.going_on]
        return "\n".join(lines) or "nothing to collect"


def building(
    asks: Sequence[Ask], places: Places, *, dry_run: bool, out: TextIO | None = None
) -> Callable[[Host], Built]:
    """The work that builds on each host, its log lines prefixed with the host's name."""
    by_host = {ask.host.name: ask for ask in asks}
    width = max(len(name) for name in by_host)

    def work(host: Host) -> Built:
        ask = by_host[host.name]
        stream = host_stream(host.name, out if out is not None else sys.stderr, width)
        transport = open_transport(ask.host, places, readonly=dry_run)
        try:
            follower = Follower(transport, places, PlainObserver(host.name, stream))
            return build_only(transport, ask, follower, dry_run=dry_run, say=lambda text: print(text, file=stream))
        finally:
            transport.close()

    return work


def standing(records: Sequence[Record], places: Places) -> Callable[[Host], Standing]:
    """The work that asks each host for the states of its runs."""

    def work(host: Host) -> Standing:
        return Standing(_states(host, records, places))

    return work


def gathering(records: Sequence[Record], places: Places) -> Callable[[Host], Gathered]:
    """The work that copies every finished run of each host; one that cannot be copied hides no other."""

    def work(host: Host) -> Gathered:
        states = _states(host, records, places)
        copies, failed = {}, {}
        for run, state in states.items():
            if state.state != "finished" or run.startswith(NO_EVIDENCE):
                continue
            where = next(one for one in records if one.run == run).at_host(host)
            transport = open_transport(where, places)
            try:
                copies[run] = collect(transport, run, places)
            except LatentForgeError as error:
                failed[run] = error
            finally:
                transport.close()
        return Gathered(copies, failed, tuple(run for run, state in states.items() if state.going_on))

    return work


def _states(host: Host, records: Sequence[Record], places: Places) -> dict[str, RunState]:
    """The states of a host's runs, asked once for each root and user that they were given to it under."""
    mine = [one for one in records if one.host == host.name]
    states: dict[str, RunState] = {}
    groups: dict[tuple[str | None, str | None], list[Record]] = {}
    for one in mine:
        groups.setdefault((one.root, one.user), []).append(one)
    if not groups:
        transport = open_transport(host, places, readonly=True)
        try:
            call(transport, "status", {"runs": []})  # nothing to ask, but whether it answers is an answer
        finally:
            transport.close()
    for group in groups.values():
        transport = open_transport(group[0].at_host(host), places, readonly=True)
        try:
            found = call(transport, "status", {"runs": [one.run for one in group]}).result
        finally:
            transport.close()
        states |= {run: RunState.model_validate(state) for run, state in found.items()}
    return states
