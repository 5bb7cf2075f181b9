"""How the hosts of a run find each other: the leader listens at its address on the link, the others come there."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from latentforge.errors import CrashedError, FailedError, LatentForgeError, RefusedError
from latentforge.events import EventLog
from latentforge.spec.hosts import Hosts
from latentforge.spec.identity import RunIdentity
from latentforge.train import effective
from latentforge.train.hosts.wire import HostLost, Link, Message

SAID_SECONDS = 60.0
_HANDSHAKE_SECONDS = 10.0
_AGAIN_SECONDS = 1.0
_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Came:
    """A host that has come to the leader: the connection to it, and what it told of itself."""

    index: int
    link: Link
    told: dict[str, Any]


def check_interface(hosts: Hosts) -> None:
    """Refuse an interface that this host has not: gloo and NCCL would fail, or take another one."""
    there = [name for _, name in socket.if_nameindex()]
    if hosts.interface not in there:
        raise RefusedError(
            f"the link of host {hosts.here} is to be {hosts.interface!r}, and it has {', '.join(sorted(there))}",
            next=f"mend link of {hosts.here} in hosts.toml, then plan again:  latentforge dispatch go",
        )


class Door:
    """Where the leader of ``run`` listens from its beginning to its end; who comes is asked for run, place and code.

    FailedError where the address is not this host's, or the port is taken.
    """

    def __init__(self, run: RunIdentity, hosts: Hosts) -> None:
        check_interface(hosts)
        self._run, self._hosts = run, hosts
        self._here: dict[int, Came] = {}
        self._refusal: LatentForgeError | None = None
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._door = _listening(hosts)
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, port, *_ = self._door.getsockname()
        return str(host), int(port)

    def gather(self, log: EventLog) -> list[Came]:
        """The other hosts, once all have come; CrashedError where one has not within ``wait_seconds``."""
        hosts, began, said = self._hosts, time.monotonic(), time.monotonic()
        wanted = range(1, len(hosts.hosts))
        while True:
            with self._changed:
                for index, came in list(self._here.items()):
                    if came.link.is_lost:  # it may come again
                        came.link.close()
                        del self._here[index]
                if self._refusal is not None:
                    raise self._refusal
                missing = [hosts.hosts[index] for index in wanted if index not in self._here]
                if not missing:
                    return [self._here[index] for index in wanted]
                self._changed.wait(_LOOK_SECONDS)
            waited, at = time.monotonic() - began, f"{hosts.address}:{hosts.port}"
            if waited > hosts.wait_seconds:
                raise CrashedError(
                    f"host {', '.join(missing)} did not come to {at} within {_long(hosts.wait_seconds)}",
                    next="see how its run ended (latentforge dispatch ls), then:  "
                    "latentforge dispatch go --attempt next",
                )
            if time.monotonic() - said > SAID_SECONDS:
                said = time.monotonic()
                log.say(f"waiting for {', '.join(missing)} at {at}: {_long(waited)} of {_long(hosts.wait_seconds)}")

    def close(self, code: int, reason: str, next: str | None) -> None:
        """Listen no longer, and tell who came how the run ended."""
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        with self._lock:
            came = list(self._here.values())
        for one in came:
            with contextlib.suppress(HostLost):
                one.link.tell("end", code=code, reason=reason, next=next)
        for one in came:
            one.link.close()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._door.accept()
            except OSError:
                return
            threading.Thread(target=self._receive, args=(connection,), daemon=True).start()

    def _receive(self, connection: socket.socket) -> None:
        """Ask who has come. A stranger is told whom this is, and forgotten."""
        link = Link("?", connection, self._hosts.deadline_seconds)
        try:
            hello = link.take(within=_HANDSHAKE_SECONDS)
            answer, wait = self._judged(hello, link)
            if answer is not None:
                link.tell("refused", what=str(answer), next=answer.next, wait=wait)
                link.close()
        except Exception:  # whoever it was says nothing that a host of this run says
            link.close()

    def _judged(self, hello: Message, link: Link) -> tuple[LatentForgeError | None, bool]:
        """Why who came is not let in, and whether it is to come again."""
        hosts, told = self._hosts, hello.fields
        if hello.kind != "hello" or told["follows"] != self._run.run_id:
            return RefusedError(f"{hosts.address}:{hosts.port} leads another run than {told.get('follows')}"), True
        index = int(told["index"])
        if told["hosts"] != hosts.hosts or not 0 < index < len(hosts.hosts):
            again = "plan again, for all hosts at once:  latentforge dispatch go"
            return RefusedError(f"host {index} of {told['hosts']} has come to another run's hosts", next=again), False
        link.peer = hosts.hosts[index]
        if told["code"] != self._run.code:
            what = f"host {link.peer} runs code {told['code'][:12]}…, and {hosts.here} {self._run.code[:12]}…"
            return self._refuse(what), False
        with self._changed:
            before = self._here.get(index)
            if before is not None and not before.link.is_lost:
                return RefusedError(f"a process of host {link.peer} is here already"), True
            link.tell("welcome", run=self._run.run_id)
            self._here[index] = Came(index, link, told)
            self._changed.notify_all()
        return None, False

    def _refuse(self, what: str) -> LatentForgeError:
        """The two cannot be one run, and waiting changes nothing: it ends."""
        refusal = RefusedError(what, next="plan again, for all hosts at once:  latentforge dispatch go")
        with self._changed:
            self._refusal = refusal
            self._changed.notify_all()
        return refusal


def _listening(hosts: Hosts) -> socket.socket:
    where = f"{hosts.address}:{hosts.port}"
    door = socket.socket(socket.AF_INET6 if ":" in hosts.address else socket.AF_INET, socket.SOCK_STREAM)
    # A run that begins again finds the port of the one before it, whose connections may not have faded yet.
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((hosts.address, hosts.port))
        door.listen(socket.SOMAXCONN)
    except OSError as error:
        door.close()
        why = {
            errno.EADDRNOTAVAIL: f"no interface of host {hosts.here} has this address now",
            errno.EADDRINUSE: "another process listens there",
        }.get(error.errno or 0, error.strerror or str(error))
        raise FailedError(
            f"{where}: {why}",
            next=f"see ip -br addr show dev {hosts.interface} and ss -ltnp on {hosts.here}, then:  "
            "latentforge dispatch go --attempt next",
        ) from error
    return door


def come_to(follower: RunIdentity, hosts: Hosts, log: EventLog) -> Link:
    """The connection to the leader, once it is there and has let this host in. CrashedError where it was not there
    within ``wait_seconds``; what the leader refused is raised in its words."""
    check_interface(hosts)
    began, said, last, at = time.monotonic(), time.monotonic(), "", f"{hosts.address}:{hosts.port}"
    log.say(f"waiting for {hosts.leader} at {at}, for at most {_long(hosts.wait_seconds)}")
    while True:
        link, why = _tried(follower, hosts)
        if link is not None:
            return link
        waited = time.monotonic() - began
        if waited > hosts.wait_seconds:
            raise CrashedError(
                f"host {hosts.leader} did not let this one in at {at} within {_long(hosts.wait_seconds)}: {why}",
                next="see how its run ended (latentforge dispatch ls), then:  latentforge dispatch go --attempt next",
            )
        if why != last or time.monotonic() - said > SAID_SECONDS:
            said, last = time.monotonic(), why
            log.say(f"waiting for {hosts.leader}: {why} ({_long(waited)} of {_long(hosts.wait_seconds)})")
        time.sleep(_AGAIN_SECONDS)


def _tried(follower: RunIdentity, hosts: Hosts) -> tuple[Link | None, str]:
    try:
        patience = min(hosts.deadline_seconds, _HANDSHAKE_SECONDS)
        connection = socket.create_connection((hosts.address, hosts.port), patience)
    except OSError as error:
        return None, "it does not listen there yet" if error.errno == errno.ECONNREFUSED else _said(error)
    link = Link(hosts.leader, connection, hosts.deadline_seconds)
    told = {"follows": follower.spec["follows"], "index": hosts.index, "hosts": hosts.hosts, "code": follower.code}
    about = {"interface": hosts.interface, "hca": hosts.hca, "pid": os.getpid(), "machine": platform.machine()}
    try:
        link.tell("hello", **told, **about, versions=effective.versions())
        answer = link.take(within=_HANDSHAKE_SECONDS)
    except HostLost as lost:
        link.close()
        return None, str(lost)
    if answer.kind == "welcome":
        return link, ""
    link.close()
    if answer.kind != "refused" or answer.fields["wait"]:
        return None, str(answer.fields.get("what", answer.kind))
    raise RefusedError(f"host {hosts.leader}: {answer.fields['what']}", next=answer.fields["next"])


def _said(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _long(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 36_000 else f"{seconds / 3600:.0f} h"
