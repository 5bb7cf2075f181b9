"""The leader's side of a run over several hosts: it waits for the others, lends them what the run reads, and tells them
to begin and how it ended."""

from __future__ import annotations

from typing import Any

from latentforge.errors import FailedError
from latentforge.events import EventLog
from latentforge.spec.hosts import Hosts, check_hosts, hosts_of
from latentforge.spec.run import RunDir
from latentforge.train import effective
from latentforge.train.engines.launching import Place, store_at
from latentforge.train.hosts.abreast import Abreast
from latentforge.train.hosts.meeting import Came, Door
from latentforge.train.hosts.mirror import Lent, Throttled, lend, read_by
from latentforge.train.hosts.wire import Link, refuse_ended


class Leading:
    """The leader of ``run``, from before its first check, so that who comes learns how it ended in any case."""

    def __init__(self, run: RunDir, log: EventLog, hosts: Hosts) -> None:
        identity = run.load_identity()
        self.processes = check_hosts(identity.kind, identity.spec, len(hosts.hosts))
        self._run, self._log, self._hosts = run, log, hosts
        self._door = Door(identity, hosts)

    @classmethod
    def of(cls, run: RunDir, log: EventLog) -> Leading | None:
        """The leader that this run is by its launch record; None where it is on one host, or follows another."""
        hosts = hosts_of(run.load_launch())
        return cls(run, log, hosts) if hosts is not None and hosts.leads else None

    def meet(self) -> tuple[Place, Abreast]:
        """Wait for all hosts and lend them what the run reads; where the processes of this one stand among all, and the
        others as these run. They begin when this returns."""
        hosts, log = self._hosts, self._log
        with log.phase("rendezvous", hosts=hosts.hosts, address=hosts.address, port=hosts.port):
            came = self._door.gather(log)
        self._record(came)
        with log.phase("mirror"):
            self._lend([one.link for one in came])
        self._store = store_at(hosts.address)
        world = self.processes * len(hosts.hosts)
        for one in came:
            one.link.tell("go", port=self._store.port)
        place = Place(hosts.address, self._store.port, 0, world, hosts.here, hosts.environment())
        return place, Abreast([one.link for one in came])

    def end(self, code: int, reason: str, next: str | None = None) -> None:
        """Tell the others how the run ended, and close all connections."""
        self._door.close(int(code), reason, next)

    def _lend(self, links: list[Link]) -> None:
        reading = read_by(self._run)
        by_path = {one.path: one for one in reading.files}
        for link in links:
            link.tell("run", **reading.as_json())
        for link in links:
            wanted: list[Lent] = [by_path[path] for path in expect(link, "want")["paths"]]
            lend(link, wanted, Throttled(self._log, "mirror"))
            self._log.say(f"host {link.peer}: {mirrored(wanted, reading.files)}")
        for link in links:
            expect(link, "ready")

    def _record(self, came: list[Came]) -> None:
        """Say who takes part, in the log and in the run's evidence; what differs between them is a warning."""
        hosts, each = self._hosts, self.processes
        ours, others = effective.versions(), []
        for one in came:
            others.append({"host": one.link.peer, **{key: one.told[key] for key in ("interface", "hca", "versions")}})
            theirs = one.told["versions"]
            differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            if differing:
                said = ", ".join(f"{name} {ours.get(name)} here, {theirs.get(name)} there" for name in differing)
                self._log.warning(f"host {one.link.peer} has other versions: {said}")
        world: dict[str, Any] = hosts.as_json() | {
            "processes": each,
            "ranks": {name: list(range(at * each, (at + 1) * each)) for at, name in enumerate(hosts.hosts)},
            "others": others,
        }
        effective.record(self._run, world=world)
        self._log.say(f"{len(hosts.hosts)} hosts, {counted(each)} on each: {', '.join(hosts.hosts)}")


def expect(link: Link, kind: str) -> dict[str, Any]:
    """The fields of the next message, which has to be of a kind; what the other host ended by is raised."""
    message = link.take()
    refuse_ended(link, message)
    if message.kind != kind:
        raise FailedError(f"host {link.peer} told {message.kind!r} where {kind!r} was to come")
    return message.fields


def counted(processes: int) -> str:
    """So many processes, for people."""
    return "1 process" if processes == 1 else f"{processes} processes"


def mirrored(moved: list[Lent], all: list[Lent]) -> str:
    """How much of what the run reads had to be moved, for people."""
    mib = [sum(one.bytes for one in some) / 2**20 for some in (moved, all)]
    return f"{len(moved)} of {len(all)} files moved, {mib[0]:.1f} of {mib[1]:.1f} MiB; the rest was there"
