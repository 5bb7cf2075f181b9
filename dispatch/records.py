"""The laptop's memory of what it gave to which host: enough to find a run again by the beginning of its name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from dispatch.hosts.inventory import Host
from dispatch.places import Places, write_atomic, writing
from dispatch.transport.call import Transport
from dispatch.transport.retry import call
from latentforge.errors import RefusedError
from latentforge.spec.identity import RUN_ID


@dataclass(frozen=True)
class Beside:
    """The second host of a run over two, and the runs there that follow those of its chain."""

    host: str
    root: str | None
    user: str | None
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """A run that this laptop has launched, followed or collected, and where it is."""

    run: str
    host: str
    root: str | None
    user: str | None
    chain: tuple[str, ...]
    recipe: str
    plan: str
    at: str
    lanes: dict[str, Any] | None = None
    beside: Beside | None = None

    @property
    def context(self) -> dict[str, Any]:
        """What evidence says of the plan that a run was part of."""
        return plan_context(self.plan, self.recipe, self.lanes)

    def at_host(self, host: Host) -> Host:
        """The host as it was named when the run was given to it."""
        user = self.user if not host.is_local else None
        return host.model_copy(update={"root": self.root, **({"user": user} if user else {})})

    def following(self) -> tuple[Record, ...]:
        """The records of the runs that follow those of its chain on a second host; none where it has one host."""
        if self.beside is None:
            return ()
        host, root, user, chain = self.beside.host, self.beside.root, self.beside.user, self.beside.runs
        there = replace(self, host=host, root=root, user=user, chain=chain, beside=None)
        return tuple(replace(there, run=run) for run in chain)


def plan_context(digest: str, recipe: str, lanes: dict[str, Any] | None) -> dict[str, Any]:
    """What evidence says of a plan: its digest, its recipe, and where it was for one of several lanes, the choice."""
    return {"digest": digest, "recipe": recipe, **({"lanes": lanes} if lanes else {})}


def remember(
    places: Places,
    host: Host,
    chain: Sequence[str],
    *,
    recipe: str,
    plan: str,
    lanes: dict[str, Any] | None = None,
    beside: Beside | None = None,
) -> None:
    """Note the runs of a chain; a note that says the same already stays as it is."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    for run in chain:
        record = Record(run, host.name, host.root, host.user, tuple(chain), recipe, plan, at, lanes, beside)
        earlier = _read(places, run)
        if earlier is None or not _says(earlier, record):
            with writing():
                write_atomic(places.record(run), json.dumps(asdict(record), indent=1).encode())


def _says(earlier: Record, record: Record) -> bool:
    """Whether the earlier note tells where the run is, and knows at least the same chain."""
    same_place = (earlier.host, earlier.root, earlier.user) == (record.host, record.root, record.user)
    return same_place and earlier.beside == record.beside and set(record.chain) <= set(earlier.chain)


def recorded(places: Places) -> list[Record]:
    """Every record, the newest first."""
    found = [_read(places, path.stem) for path in places.records.glob("*.json")]
    return sorted((one for one in found if one is not None), key=lambda one: (one.at, one.run), reverse=True)


def find(places: Places, prefix: str) -> Record:
    """The record of the run that begins so; refused where none does, or several do."""
    known = recorded(places)
    matching = [one for one in known if one.run == prefix] or [one for one in known if one.run.startswith(prefix)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise RefusedError(
            f"{prefix!r} is the beginning of {len(matching)} runs",
            next="\n".join(sorted(one.run for one in matching)[:8]),
        )
    if RUN_ID.fullmatch(prefix):
        raise RefusedError(
            f"{prefix} was not dispatched from this laptop", next=f"say where it is:  … {prefix} --host HOST"
        )
    close = difflib.get_close_matches(prefix, [one.run for one in known], n=1, cutoff=0.5)
    raise RefusedError(
        f"no run that this laptop knows begins with {prefix!r}",
        next=f"did you mean {close[0]}?" if close else "latentforge dispatch status   lists what it knows",
    )


def find_there(transport: Transport, beginning: str) -> str:
    """The id of the run on a host that begins so, whoever launched it; refused where none does, or several do."""
    name = transport.host.name
    if RUN_ID.fullmatch(beginning):
        return beginning
    runs = sorted(call(transport, "status", {"runs": [], "beginning": beginning}).result) if beginning else []
    if len(runs) == 1:
        return runs[0]
    if runs:
        raise RefusedError(f"{beginning!r} is the beginning of {len(runs)} runs on {name}", next="\n".join(runs[:8]))
    raise RefusedError(f"no run on {name} begins with {beginning!r}, and none that this laptop gave to it")


def _read(places: Places, run: str) -> Record | None:
    try:
        value: dict[str, Any] = json.loads(places.record(run).read_text())
        beside = value.get("beside")
        if beside is not None:
            beside = Beside(**{**beside, "runs": tuple(beside["runs"])})
        return Record(**{**value, "chain": tuple(value["chain"]), "beside": beside})
    except (OSError, ValueError, TypeError, KeyError):
        return None
