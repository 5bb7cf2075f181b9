"""Where two hosts meet for a run: the leader's address on their link, a port of the run's own; what speaks against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dispatch.hosts.facts import HostFacts, WireFact
from dispatch.planning.ask import Ask
from dispatch.planning.plan import Refusal, Step
from latentforge.spec.hosts import PORTS, Hosts
from latentforge.verdicts import ExitCode

LEADER_WAITS_SECONDS = 300.0
"""How long a leader waits for the other host: that one was launched before it, and has nothing else to do, unless it
was told to ``--wait`` for what it is doing."""
FOLLOWER_WAITS_SECONDS = 24 * 3600.0
"""How long who waits for work of others does, if nobody cancels it: the leader makes all earlier stages meanwhile."""


@dataclass(frozen=True)
class Side:
    """One of the two hosts: what is asked of it, and what was seen of it."""

    ask: Ask
    facts: HostFacts

    @property
    def name(self) -> str:
        """The host's name."""
        return self.ask.host.name

    @property
    def wire(self) -> WireFact:
        """Its interface on the link; one of which nothing is known, where its agent said nothing."""
        return self.facts.link or WireFact(interface=str(self.ask.host.link))


def port_of(run: str) -> int:
    """The port at which a run's hosts meet: another for each attempt, and the same whenever it is asked."""
    return PORTS[int(run.rpartition("-")[2][:8], 16) % len(PORTS)]


def world_of(sides: Sequence[Side], index: int, run: str) -> dict[str, object]:
    """``world`` of launch.json for the host ``index`` in the run of the leader."""
    leader, here = sides[0], sides[index]
    assert leader.wire.address is not None
    world = Hosts(
        hosts=[side.name for side in sides],
        index=index,
        address=leader.wire.address,
        port=port_of(run),
        interface=here.wire.interface,
        hca=here.ask.host.hca,
        deadline_seconds=leader.ask.host.link_deadline,
        wait_seconds=FOLLOWER_WAITS_SECONDS if index or here.ask.wait else LEADER_WAITS_SECONDS,
    )
    return world.as_json()


def judge_meeting(sides: Sequence[Side]) -> tuple[Step, list[Refusal], list[str]]:
    """The step ``link`` of a plan, what refuses it, and notes."""
    against = [*_unfit(sides), *_unlike(sides)]
    if against:
        return Step("link", "refuse", against[0].why), against, []
    each = ", ".join(f"{side.name} {side.wire.interface} {side.wire.address}" for side in sides)
    first, second = (side.wire for side in sides)
    notes = []
    if first.network != second.network:
        notes.append(f"link: {first.network} and {second.network} are two networks: what lies between may be slow")
    if first.mtu != second.mtu:
        notes.append(f"link: MTU {first.mtu} on {sides[0].name}, {second.mtu} on {sides[1].name}")
    return Step("link", "keep", f"{each}; silence of {sides[0].ask.host.link_deadline:g} s ends a run"), [], notes


def _unfit(sides: Sequence[Side]) -> Iterator[Refusal]:
    """Interfaces at which nobody can be met."""
    for side in sides:
        wire, again = side.wire, f"latentforge dispatch enrol {side.name} --link INTERFACE"
        if wire.up is None:
            there = ", ".join(wire.others) or "not known"
            yield _refusal(f"{side.name} has no interface {wire.interface!r} (there are: {there})", again)
        elif wire.address is None:
            why = f"{wire.interface} of {side.name} has no IPv4 address"
            yield _refusal(why, f"give it one on {side.name}, or name another:  {again}")
        elif not wire.up:
            why = f"{wire.interface} of {side.name} is down"
            yield _refusal(why, f"on {side.name}:  ip link set {wire.interface} up")
    for side in sides:
        if side.wire.up and not side.wire.carrier:
            why = f"{side.wire.interface} of {side.name} has no carrier: nothing is up at the other end of its cable"
            yield _refusal(why, "look at the cable, and at the interface on the other host")
    first, second = sides
    if first.wire.address is not None and first.wire.address == second.wire.address:
        shared = f"have one address on the link, {first.wire.address}: one machine by two names?"
        why = f"{first.name} and {second.name} {shared}"
        yield _refusal(why, f"latentforge dispatch hosts   shows both; or run on one of them:  --host {first.name}")


def _unlike(sides: Sequence[Side]) -> Iterator[Refusal]:
    """What both hosts must have alike, since their processes compute one step together."""
    first, second = sides
    pairs = {
        "processors": tuple(side.facts.host.arch for side in sides),
        "lock files": tuple(f"{side.ask.lock_name} {side.ask.lock[:12]}" for side in sides),
        "GPUs": tuple(_gpu(side) for side in sides),
    }
    for what, (one, other) in pairs.items():
        if one != other:
            yield _refusal(
                f"{first.name} and {second.name} have other {what}, {one} and {other}: their processes would not "
                "compute the same step",
                f"two hosts that are alike, or one of them:  --host {first.name}",
            )


def _gpu(side: Side) -> str:
    names = [str(one.get("name")) for one in side.facts.host.gpus if isinstance(one, dict)]
    return names[0] if names else "none"


def _refusal(why: str, following: str) -> Refusal:
    return Refusal(why, following, ExitCode.FAIL)
