"""The processes of a run on this host beside those on others: watched together, stopped together, ended together."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict

from latentforge.train.engines.launching import GRACE_SECONDS, Ended, Ranks
from latentforge.train.hosts.wire import HostLost, Link, Message, refuse_ended
from latentforge.train.stopping import SHARE, stop_requested

_LAST = 0.95
"""Of the time between the signal and the kill: until who waits for the processes of a run ends them."""


class Abreast:
    """What this host tells the hosts at the other ends of ``links`` while its processes run, and they it.

    A stop that one is asked for, and a process that fails, are told at once, by the leader to all others too.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self._links = links
        self._told: set[str] = set()
        self.lost: HostLost | None = None
        self._ended: dict[str, list[Ended]] = {}

    def look(self, ranks: Ranks) -> None:
        """Do what the others told, and tell them what became of the processes here. HostLost at once where one is
        silent; where its end of the connection was closed, the processes here are left their time to end."""
        if stop_requested() is not None:
            self._stop(ranks)
        if ranks.failing:
            self._tell_once("failing")
        for link in self._links:
            try:
                for message in link.arrived():
                    self._take(link, message, ranks)
            except HostLost as lost:
                self.lost = self.lost or lost
                if link.silent:
                    self.refuse_lost()
                ranks.hurry()

    def ended(self, here: list[Ended]) -> list[Ended]:
        """How the processes of the other hosts ended, once all have told; called when those ``here`` have."""
        if any(one.returncode for one in here):
            self._tell_once("failing")
        until = time.monotonic() + GRACE_SECONDS + max((link.deadline for link in self._links), default=0.0)
        for link in self._links:
            while link.peer not in self._ended and self.lost is None:
                try:
                    self._take(link, link.take(within=max(0.0, until - time.monotonic())), None)
                except HostLost as lost:
                    self.lost = lost
        return [one for ended in self._ended.values() for one in ended]

    def refuse_lost(self) -> None:
        """Raise the loss of a host, with what it led to."""
        if self.lost is not None:
            raise HostLost(f"{self.lost}; the processes here were ended", next=self.lost.next)

    def tell_ended(self, here: list[Ended]) -> None:
        """Tell how the processes here ended; one that is gone need not be told."""
        for link in self._links:
            with contextlib.suppress(HostLost):
                link.tell("ended", ranks=[asdict(one) for one in here])

    def _take(self, link: Link, message: Message, ranks: Ranks | None) -> None:
        refuse_ended(link, message)
        if message.kind == "ended":
            self._ended[link.peer] = [Ended(**one) for one in message.fields["ranks"]]
        elif message.kind == "stop" and ranks is not None:
            self._stop(ranks)
        elif message.kind == "failing":
            self._tell_once("failing")
            if ranks is not None:
                ranks.hurry()

    def _stop(self, ranks: Ranks) -> None:
        if "stop" not in self._told:
            ranks.tell(signal.SIGTERM)
            # They give up by themselves, and a checkpoint under way has a tenth more: this process, which would kill
            # them, gives up behind that.
            left, _ = signal.getitimer(signal.ITIMER_REAL)
            signal.setitimer(signal.ITIMER_REAL, left * _LAST / SHARE)
        self._tell_once("stop")

    def _tell_once(self, kind: str) -> None:
        if kind in self._told:
            return
        self._told.add(kind)
        for link in self._links:
            # What became of one that takes nothing is found when it is listened to.
            with contextlib.suppress(HostLost):
                link.tell(kind)
