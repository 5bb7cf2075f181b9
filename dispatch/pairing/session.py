"""One dispatch over two hosts: the leader's course, with the second host followed beside it and one verdict."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from latentforge.errors import LatentForgeError, UnknownOutcomeError
from latentforge.verdicts import ExitCode

if TYPE_CHECKING:
    from dispatch.following.live import LiveObserver

_SETTLE_SECONDS = 15.0
"""What the second host has, beyond the link's own deadline, to end after its leader has."""
_ANSWER_SECONDS = 5.0


def pair_session(
    transports: tuple[Transport, Transport], places: Places, *, adjust: Callable[[Limits], Limits], json: bool = False
) -> PairSession:
    """The session of a command over two hosts, whose lines say which host they are of."""
    first, second = _observers([one.host.name for one in transports], as_json=json)
    session = PairSession(transports[0], places, json=json, adjust=adjust, observer=first)
    session.second = Follower(transports[1], places, second, adjust=adjust)
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

    second: Follower = field(init=False)
    """Follows the runs of the host that follows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._asks: tuple[Ask, Ask] | None = None
        self._beside: list[str] = []
        self._following: dict[str, RunState] = {}
        self._error: LatentForgeError | None = None
        self._cancelled: list[str] = []

    def go_both(self, asks: tuple[Ask, Ask], *, detach: bool) -> ExitCode:
        """Plan, show, apply, and follow both hosts to the verdict."""
        self._asks = asks
        return self.go(asks[0], detach=detach)

    def watch_both(self, run: str, chain: list[str], context: Mapping[str, object], following: list[str]) -> ExitCode:
        """Follow a run as ``watch`` does, and beside it the runs ``following`` it on the second host."""
        self._beside = following
        return self.watch(run, chain, context)

    def _survey(self, ask: Ask) -> tuple[Plan, HostFacts]:
        assert self._asks is not None
        plan, facts = survey_both([self.transport, self.second.transport], self._asks, self.places)
        return plan, facts[0]

    def _launch(self, plan: Plan, ask: Ask) -> Plan:
        assert self._asks is not None
        ends = [
            End(self._asks[0], self.transport, self.follower),
            End(self._asks[1], self.second.transport, self.second),
        ]
        return launch_both(plan, ends, self.places, say=self.say)

    def _apply(self, plan: Plan, ask: Ask) -> Applied:
        """Carry the plan out and follow both hosts; the second one's runs that the leader never came to are ended."""
        plan = self._launch(plan, ask)
        assert plan.beside is not None
        leads = {one.run: one.resolved["leader"]["run"] for one in plan.beside.chain}
        with self._second_followed([*leads]) as never:
            applied = follow_chain(plan, self.follower)
            never += [run for run in leads if leads[run] not in applied.followed and not applied.state.passed]
        return applied

    def _watched(self, run: str, chain: list[str]) -> tuple[RunState, str]:
        with self._second_followed(self._beside) as never:
            state, last = super()._watched(run, chain)
            never += self._beside if last != run and state.has_ended else []
        return state, last

    @contextmanager
    def _second_followed(self, runs: list[str]) -> Iterator[list[str]]:
        """Follow the second host's runs in turn while the leader is followed, and then see them end.

        They have as long as it may take there to notice the leader's end; what the caller puts into the list has no
        leader that could end, and is cancelled. A host that does not answer is not waited for: it may have gone down
        with the run.
        """
        thread = threading.Thread(target=self._follow_second, args=(runs,), daemon=True)
        never: list[str] = []
        if runs:
            thread.start()
        yield never
        if never:
            self._cancelled = cancel_following(self.second.transport, never)
        if runs:
            thread.join(self.second.transport.host.link_deadline)
        if thread.is_alive() and self._answers(runs[-1]):
            thread.join(_SETTLE_SECONDS)
            if thread.is_alive():
                left = [run for run in runs if run not in self._following]
                self._cancelled += cancel_following(self.second.transport, left)
        if runs:
            thread.join(_SETTLE_SECONDS)

    def _follow_second(self, runs: list[str]) -> None:
        """Follow the second host's runs in turn; what stands in the way of that is told, and hides nothing else."""
        for position, run in enumerate(runs, start=1):
            try:
                state = self.second.follow(run, position=position, of=len(runs))
            except LatentForgeError as error:
                self._error = self._error or error
                return
            self._following[run] = state
            if not state.passed:
                # If its leader is what went down, there is nothing to come of asking that for a quarter of an hour.
                self.follower.patience = _SETTLE_SECONDS
                return

    def _answers(self, run: str) -> bool:
        """Whether the second host can be asked; what is then not known of it is noted where it cannot."""
        try:
            self.second.transport.call("status", {"runs": [run]}, timeout=_ANSWER_SECONDS)
        except LatentForgeError as error:
            # Its follower has to have put its cursors down before this process ends.
            self.second.patience = 0.0
            self.second.transport.close()
            self._error = UnknownOutcomeError(
                f"it does not answer, so how {run} ended is not known ({error})",
                next=f"latentforge dispatch watch {run}",
            )
            return False
        return True

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
            host = self.second.transport.host.name
            self.say(f"{host}: {self._error}" + (f"\n  next: {self._error.next}" if self._error.next else ""))
        if code is not ExitCode.PASS:
            return code
        known = [state for state in self._following.values() if state.state != "absent"]  # else cleaned up since
        codes = [earned_code(state) for state in known]
        return worst([*codes, *([self._error.code] if self._error is not None else [])])
