"""The run of a host that follows: it comes to the leader, mirrors what the run reads, and takes part in its training.

It makes nothing: events, checkpoints and products are the leader's, and so is the exit code.
"""

from __future__ import annotations

import contextlib
import time
from typing import TextIO

from latentforge.errors import LatentForgeError, RefusedError
from latentforge.events import EventLog
from latentforge.memory import MemoryPlan
from latentforge.spec.hosts import Hosts, check_hosts, hosts_of
from latentforge.spec.run import RunDir
from latentforge.train import effective, memory
from latentforge.train.engines.launching import Place, Ranks
from latentforge.train.held import Peak
from latentforge.train.hosts.abreast import Abreast
from latentforge.train.hosts.leading import expect, mirrored
from latentforge.train.hosts.meeting import come_to
from latentforge.train.hosts.mirror import Mirror, Reading, Throttled
from latentforge.train.hosts.wire import HostLost, Link, refuse_ended
from latentforge.train.spread import begin, check_devices
from latentforge.train.stopping import Interrupted, deferred_stop, stop_requested
from latentforge.verdicts import ExitCode

_LOOK_SECONDS = 0.2


def take_part(run: RunDir, log: EventLog, *, text: TextIO | None = None) -> tuple[MemoryPlan, Peak] | None:
    """Follow the leader of ``run`` to its end; what was planned here and what the processes held. Raises what the whole
    ended by where that is not 0."""
    identity, hosts = run.load_identity(), hosts_of(run.load_launch())
    if hosts is None or hosts.leads:
        raise RefusedError(
            f"{run.run} follows {identity.spec.get('follows')}, and its launch.json does not say at which address",
            next="plan again:  latentforge dispatch go",
        )
    with log.phase("rendezvous", hosts=hosts.hosts, address=hosts.address, port=hosts.port):
        link = come_to(identity, hosts, log)
    code, reason, then = ExitCode.CRASHED, "", None
    try:
        return _follow(run, log, hosts, link, text)
    except (Interrupted, LatentForgeError) as error:
        code = error.code if isinstance(error, LatentForgeError) else ExitCode.UNKNOWN
        reason, then = str(error), error.next if isinstance(error, LatentForgeError) else None
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        if reason:
            with contextlib.suppress(HostLost):
                link.tell("end", code=int(code), reason=reason, next=then)
        link.close()


def _follow(
    run: RunDir, log: EventLog, hosts: Hosts, link: Link, text: TextIO | None
) -> tuple[MemoryPlan, Peak] | None:
    with log.phase("mirror"):
        leader = _mirror(run, log, link)
    identity = leader.load_identity()
    processes = check_hosts(identity.kind, identity.spec, len(hosts.hosts))
    check_devices(leader, processes)
    effective.record(run, world=hosts.as_json() | {"processes": processes})
    planned = memory.plan_of(leader, identity, leads=False)
    if planned is not None:
        memory.require_room(run, log, planned)
    link.tell("ready")
    port, world = int(expect(link, "go")["port"]), processes * len(hosts.hosts)
    place = Place(hosts.address, port, hosts.index * processes, world, hosts.here, hosts.environment())
    abreast = Abreast([link])
    with deferred_stop(), begin(leader, log, processes, planned, text=text, place=place) as ranks:
        ended = ranks.wait(look=lambda: abreast.look(ranks))
        abreast.tell_ended(ended)
        abreast.refuse_lost()
        _end_with(link, abreast, ranks)
    held = Peak.sum(Peak(*one.told["value"]) for one in ended if "value" in one.told)
    return None if planned is None else (planned, held)


def _mirror(run: RunDir, log: EventLog, link: Link) -> RunDir:
    began = time.monotonic()
    reading, mirror = Reading.of_json(expect(link, "run")), Mirror(run)
    lacking = mirror.lacking(reading, Throttled(log, "compare"))
    mirror.require_room(lacking)
    link.tell("want", paths=[one.path for one in lacking])
    mirror.receive(link, lacking, Throttled(log, "mirror"))
    log.say(f"{mirrored(lacking, reading.files)} ({time.monotonic() - began:.1f} s)")
    return mirror.leader(reading, run.load_identity().spec["follows"])


def _end_with(link: Link, abreast: Abreast, ranks: Ranks) -> None:
    """Wait for the leader, which may still write what the run makes, and end as it does."""
    while True:
        for message in link.arrived():
            if message.kind == "end" and message.fields["code"] == ExitCode.PASS:
                return
            refuse_ended(link, message)
        if stop_requested() is not None:
            abreast.look(ranks)
        time.sleep(_LOOK_SECONDS)
