"""One dispatch over two hosts: the leader's course, with the second host followed beside it and one verdict."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dispatch.apply import Applied, follow_chain
from dispatch.conclude import earned_code, worst
from dispatch.ends import RunEnd
from dispatch.following.follow import Follower
from dispatch.following.limits import Limits
from dispatch.following.watching import PlainObserver
from dispatch.hosts.facts import HostFacts, RunState
from dispatch.lanes.streams import host_stream
from dispatch.pairing.apply import End, cancel_following, launch_both
from dispatch.pairing.survey import survey_both
from dispatch.places import Places, check_evidence_folder
from dispatch.planning.ask import Ask
from dispatch.planning.plan import Plan
from dispatch.session import Session, show_preview
from dispatch.transport.call import Transport
from latentforge.errors import LatentForgeError
from latentforge.verdicts import ExitCode

if TYPE_CHECKING:
    from dispatch.following.live import LiveObserver

_SETTLE_SECONDS = 15.0
"""What the second host has, beyond the link's own deadline, to end after its leader has."""


def pair_session(
    asks: tuple[Ask, Ask],
    transports: tuple[Transport, Transport],
    places: Places,
    *,
    json: bool,
    adjust: Callable[[Limits], Limits],
) -> PairSession:
    """The session of a command over two hosts, whose lines say which host they are of."""
    observers = _observers([ask.host.name for ask in asks], as_json=json)
    session = PairSession(transports[0], places, json=json, adjust=adjust, observer=observers[0])
    session.second = End(asks[1], transports[1], Follower(transports[1], places, observers[1], adjust=adjust))
    return session


def _observers(hosts: list[str], *, as_json: bool) -> list[PlainObserver | LiveObserver]:
    if as_json or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        out, width = sys.stderr if as_json else sys.stdout, max(map(len, hosts))
        return [PlainObserver(host, host_stream(host, out, width)) for host in hosts]
    from dispatch.following.live import Screen  # rich is slow to import, and not needed in a pipe

    screen = Screen()
    return [screen.observer(host) for host in hosts]


def preview_both(
    asks: tuple[Ask, Ask], transports: tuple[Transport, Transport], places: Places, *, as_json: bool
) -> ExitCode:
    """Show the plan of both hosts over transports that only read; nothing is changed anywhere."""
    check_evidence_folder(places)
    assert all(one.readonly for one in transports)
    plan, _facts = survey_both(transports, asks, places)
    return show_preview(plan, asks[0], places, as_json=as_json)


@dataclass
class PairSession(Session):
    """A command that may follow a run over two hosts; Ctrl-C at any moment leaves both of them alone."""

    second: End = field(init=False)
    """The host that follows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._following: dict[str, RunState] = {}
        self._error: LatentForgeError | None = None
        self._cancelled: list[str] = []

    def _survey(self, ask: Ask) -> tuple[Plan, HostFacts]:
        plan, facts = survey_both([self.transport, self.second.transport], [ask, self.second.ask], self.places)
        return plan, facts[0]

    def _launch(self, plan: Plan, ask: Ask) -> Plan:
        return launch_both(plan, [End(ask, self.transport, self.follower), self.second], self.places, say=self.say)

    def _apply(self, plan: Plan, ask: Ask) -> Applied:
        """Carry the plan out and follow both hosts; the second one's runs that the leader never came to are ended."""
        plan = self._launch(plan, ask)
        assert plan.beside is not None
        thread = threading.Thread(target=self._follow_second, args=(plan.beside,), daemon=True)
        if plan.beside.chain:
            thread.start()
        applied = follow_chain(plan, self.follower)
        if plan.beside.chain:
            self._settle(plan.beside, applied, thread)
        return applied

    def _follow_second(self, plan: Plan) -> None:
        """Follow the second host's runs in turn; what stands in the way of that is told, and hides nothing else."""
        for position, one in enumerate(plan.chain, start=1):
            try:
                state = self.second.follower.follow(one.run, position=position, of=len(plan.chain))
            except LatentForgeError as error:
                self._error = error
                return
            self._following[one.run] = state
            if not state.passed:
                return

    def _settle(self, plan: Plan, applied: Applied, thread: threading.Thread) -> None:
        """Wait for the second host's end, for as long as it may take there to notice the leader's."""
        never = [one.run for one in plan.chain if one.resolved["leader"]["run"] not in applied.followed]
        if not applied.state.passed and never:
            self._cancelled = cancel_following(self.second.transport, never)
        self.second.follower.patience = _SETTLE_SECONDS  # whoever went down with the run is not waited for
        until = time.monotonic() + self.second.ask.host.link_deadline + _SETTLE_SECONDS
        while thread.is_alive() and time.monotonic() < until:
            thread.join(0.2)
        if thread.is_alive():
            left = [one.run for one in plan.chain if one.run not in self._following]
            self._cancelled += cancel_following(self.second.transport, left)
            thread.join(_SETTLE_SECONDS)

    def _ends(self, plan: Plan, applied: Applied) -> list[RunEnd]:
        ends = super()._ends(plan, applied)
        assert plan.beside is not None
        for one in plan.beside.chain:
            state = self._following.get(one.run, RunState(state="unknown"))
            ended = "cancelled" if one.run in self._cancelled else state.outcome or state.state
            ends.append(RunEnd(f"{plan.beside.host}: follow", one.run, ended, ()))
        return ends

    def _code(self, code: ExitCode) -> ExitCode:
        """The leader's; where it passed, the second host's has its say too."""
        if self._error is not None:
            host = self.second.ask.host.name
            self.say(f"{host}: {self._error}" + (f"\n  next: {self._error.next}" if self._error.next else ""))
        if code is not ExitCode.PASS:
            return code
        codes = [earned_code(state) for state in self._following.values()]
        return worst([*codes, *([self._error.code] if self._error is not None else [])])
