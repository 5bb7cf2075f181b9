"""The processes of one run on this host: started together, ended together, and what each of them told."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Thread
from types import TracebackType
from typing import IO, Any, Self, TextIO

import torch.distributed as dist

from latentforge.errors import CrashedError, LatentForgeError
from latentforge.train.engines.beating import HUNG_SECONDS, Pulse
from latentforge.train.stopping import Interrupted
from latentforge.verdicts import ExitCode

GRACE_SECONDS = 20.0
"""What the others are left, once one has failed, to end by themselves: they learn of it in their next collective."""
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Ended:
    """How one process ended: its exit code or the signal that killed it (negative), and what it ``told``, if it could;
    ``ours`` where that is a signal of its own host's process, ``host`` where there are several; ``hung`` how it
    was found where it gave no sign of life."""

    rank: int
    pid: int
    returncode: int
    told: Mapping[str, Any]
    ours: bool = False
    host: str = ""
    hung: str | None = None

    @property
    def named(self) -> str:
        """Its pid, and the host's name where there are several."""
        return f"pid {self.pid} on {self.host}" if self.host else f"pid {self.pid}"


@dataclass(frozen=True)
class Place:
    """Where the processes of one host stand among those of all: the store that all of them find each other by, the
    first one's rank, how many there are, this ``host``'s name, and what they are told of it."""

    address: str
    port: int
    first: int
    world: int
    host: str
    environment: Mapping[str, str]


def store_at(address: str) -> dist.TCPStore:
    """A store that listens on this address alone, at a port of the kernel's choice: torch's own listens on all."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as door:
        door.bind((address, 0))
        door.listen(socket.SOMAXCONN)
        port = door.getsockname()[1]
        return dist.TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(door.fileno())
        )


class Ranks:
    """``size`` processes on this host that each call ``module:function`` with ``arguments``; a context, which kills
    what is left of them when it is left. What they say goes where this process's own does, or into ``text``. They are
    all that there are, or in a ``place`` among others."""

    def __init__(
        self,
        target: str,
        arguments: Mapping[str, Any],
        size: int,
        *,
        threads: int | None = None,
        text: TextIO | None = None,
        place: Place | None = None,
    ) -> None:
        if place is None:
            # Held here: no process has to guess a free port, and one that is late still finds it.
            self._store = store_at("127.0.0.1")
            place = Place("127.0.0.1", self._store.port, 0, size, "", {})
        self._place = place
        self._reports: list[IO[bytes]] = []
        self._files: list[IO[bytes]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sent: set[tuple[int, int]] = set()
        self._until: float | None = None
        self._pulses: list[Pulse] = []
        self._hung: dict[int, str] = {}
        shared = {"MASTER_ADDR": place.address, "MASTER_PORT": str(place.port), "WORLD_SIZE": str(place.world)}
        shared |= place.environment
        if threads is not None:
            shared["OMP_NUM_THREADS"] = str(threads)
        for rank in range(size):
            report = tempfile.TemporaryFile()  # noqa: SIM115  closed when the context is left
            self._reports.append(report)
            program = [sys.executable, "-m", "latentforge.train.engines.rank"]
            beats = os.fdopen(os.memfd_create("beats"), "r+b", buffering=0)  # no full disk ends a sign of life
            self._files += [report, beats]
            descriptors = [str(report.fileno()), str(beats.fileno())]
            command = [*program, target, json.dumps(arguments), *descriptors, str(os.getpid())]
            own = {"RANK": str(place.first + rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
            # A group of its own: Ctrl-C reaches this process alone, which hands it on.
            self._processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **shared, **own},
                    stdout=None if text is None else subprocess.PIPE,
                    pass_fds=[report.fileno(), beats.fileno()],
                    process_group=0,
                )
            )
            self._pulses.append(Pulse(self._processes[-1].pid, beats))
        self._listeners = [Thread(target=_copy, args=(one.stdout, text)) for one in self._processes if one.stdout]
        for listener in self._listeners:
            listener.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.tell(signal.SIGKILL)
        for process in self._processes:
            process.wait()
        for listener in self._listeners:
            listener.join()
        for file in self._files:
            file.close()

    @property
    def pids(self) -> list[int]:
        """The processes by rank."""
        return [process.pid for process in self._processes]

    def tell(self, number: int) -> None:
        """Send a signal to all that still run."""
        for rank, process in enumerate(self._processes):
            if process.poll() is None:
                self._sent.add((rank, number))
                process.send_signal(number)

    @property
    def failing(self) -> bool:
        """Whether one of them has ended badly."""
        return any(process.poll() not in (None, 0) for process in self._processes)

    def hurry(self, grace: float = GRACE_SECONDS) -> None:
        """Leave them ``grace`` seconds to end by themselves, and kill them then."""
        if self._until is None:
            self._until = time.monotonic() + grace

    def wait(self, *, grace: float = GRACE_SECONDS, look: Callable[[], None] = lambda: None) -> list[Ended]:
        """Until all have ended; ``look`` is called again and again. One that gives no sign of life is killed. Once one
        has ended badly the others have ``grace`` seconds, and are killed."""
        while any(process.poll() is None for process in self._processes):
            if self.failing:
                self.hurry(grace)
            if self._until is not None and time.monotonic() > self._until:
                self.tell(signal.SIGKILL)
            self._kill_hung()
            look()
            time.sleep(_LOOK_SECONDS)
        for listener in self._listeners:
            listener.join()
        return [self._ended(rank) for rank in range(len(self._processes))]

    def _kill_hung(self) -> None:
        for rank, (process, pulse) in enumerate(zip(self._processes, self._pulses, strict=True)):
            if process.poll() is None and rank not in self._hung and (found := pulse.hangs()) is not None:
                self._hung[rank] = found
                process.kill()

    def _ended(self, rank: int) -> Ended:
        process, report = self._processes[rank], self._reports[rank]
        report.seek(0)
        said = report.read()
        told = json.loads(said) if said.endswith(b"}") else {}
        first, host = self._place.first, self._place.host
        code = int(process.returncode)
        ours, hung = (rank, -code) in self._sent, self._hung.get(rank)
        return Ended(first + rank, process.pid, code, told, ours, host, hung)


def _copy(said: IO[bytes], text: TextIO) -> None:
    for line in said:
        text.write(line.decode("utf-8", "replace"))
        text.flush()


def together(target: str, arguments: Mapping[str, Any], size: int, *, threads: int | None = None) -> list[Any]:
    """What each of ``size`` processes returned, by rank; the error of the one that failed first where one did."""
    with Ranks(target, arguments, size, threads=threads) as ranks:
        ended = ranks.wait()
    refuse_failed(ended)
    return [one.told["value"] for one in ended]


def refuse_failed(ended: list[Ended]) -> None:
    """Raise what the processes of a run failed of, where one did: a killed one says more than those that missed it, an
    error with a next step more than a crash. Interrupted where they were told to stop."""
    for one in ended:
        if one.hung is not None:
            raise CrashedError(
                f"process {one.rank} of {len(ended)} ({one.named}) gave no sign of life for {HUNG_SECONDS:g} s, its "
                f"state was {one.hung}: it was killed, and the others were ended",
                next="look who stopped it, or what it waited for, then resume:  latentforge dispatch go --attempt next",
            )
    for one in ended:
        if one.returncode < 0 and not one.ours:
            name = signal.Signals(-one.returncode).name
            raise CrashedError(
                f"process {one.rank} of {len(ended)} ({one.named}) was killed by {name}; the others were ended",
                next="look for the out-of-memory killer in the kernel's log, then resume:  "
                "latentforge dispatch go --attempt next",
            )
    failed = [one for one in ended if one.told.get("code") != 0]
    for one in failed:
        if "error" in one.told:
            raise LatentForgeError(one.told["error"], next=one.told["next"], code=ExitCode(one.told["code"]))
    for one in failed:
        if "interrupted" in one.told:
            raise Interrupted(one.told["interrupted"])
        if one.ours and one.returncode == -signal.SIGTERM:
            raise Interrupted("interrupted by SIGTERM before the processes of the run had begun")
    for one in failed:
        what = one.told.get("crash", f"ended with exit code {one.returncode} and told nothing")
        raise CrashedError(f"process {one.rank} of {len(ended)} ({one.named}): {what}")
