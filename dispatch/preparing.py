"""A run that prepares a host (a build, a warm-up, a pull): reserved, launched, followed, and passed or an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dispatch.following.follow import Follower
from dispatch.hosts.facts import RunState
from dispatch.planning.choice import told_end
from dispatch.transport.call import Transport
from dispatch.transport.retry import call
from latentforge.errors import FailedError
from latentforge.verdicts import ExitCode

LAUNCH_SECONDS = 90.0


@dataclass(frozen=True)
class Preparation:
    """One run that prepares a host, and what is said where it does not pass."""

    run: str
    kin: str
    identity: str
    told: str
    """As a sentence begins that says it did not pass."""
    next: str
    launch: Mapping[str, Any] = field(default_factory=dict)
    """Its command, environment, plan and host, and what its supervisor is to hold or watch."""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


def start(
    one: Preparation,
    transport: Transport,
    *,
    runner: str | None = None,
    wait_lease: bool = False,
    bring: Callable[[], object] = lambda: None,
) -> None:
    """Reserve and launch the run; ``bring`` is called between, when nobody removes what the reservation names."""
    record = {"run": one.run, "kin": one.kin, "resolved": {}, "predecessor": None, "lease": [], **one.launch}
    args: dict[str, Any] = {"run": one.run, "identity": one.identity, "launch": record}
    if one.secrets:
        record["secrets"], args["secrets"] = sorted(one.secrets), dict(one.secrets)
    call(transport, "reserve", args)
    bring()
    asked = {"chain": [one.run], "wait_lease": wait_lease, **({"runner": runner} if runner is not None else {})}
    call(transport, "launch", asked, timeout=LAUNCH_SECONDS)


def finish(one: Preparation, follower: Follower) -> RunState:
    """Follow the run to its end; FailedError, with the code that the run earned, where it did not pass."""
    follower.goal = one.run
    state = follower.follow(one.run)
    follower.goal = None
    if not state.passed:
        raise FailedError(
            f"{one.told}: {told_end(state)}", next=one.next, code=ExitCode(state.exit) if state.exit else None
        )
    return state
