"""The detached supervisor: one process that takes a chain of runs through and keeps their records."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import traceback
from typing import Any

from . import journal, locks
from .durable import read_json, write_json
from .job import Job
from .launching import wants_device
from .paths import Root, RunPaths
from .processes import SUPERVISOR, become_subreaper, boot_id, call_myself, look
from .reserving import never_started, remove

_LEASE_PAUSE = 0.1
#: Between TERM and KILL when the service manager wants a run to end.
STOP_GRACE = 10.0


def supervise() -> None:
    """Entry of the detached supervisor: its orders are on stdin, its first word goes to stderr, then it is alone."""
    call_myself(SUPERVISOR)
    # At a shutdown the job gets its TERM too; whoever records how it ended must outlive it.
    ignore(signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGPIPE)
    with open(0, "rb", closefd=False) as orders:
        config = json.load(orders)
    word = os.dup(2)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    root = Root(config["root"])
    work(Chain(root, [(root.run(run), fd) for run, fd in config["chain"]], config["lease"], word))


def ignore(*numbers: signal.Signals) -> None:
    """Let these signals pass."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def work(chain: Chain) -> None:
    """Take a chain through; what goes wrong with the supervisor itself is told to the launcher and the journal."""
    try:
        chain.sign()
        chain.go()
    except BaseException as error:
        with contextlib.suppress(OSError):
            journal.record(chain.current, "supervisor-error", error=traceback.format_exc()[-4000:])
        chain.say({"error": f"{type(error).__name__}: {error}"})
        raise


class Chain:
    """The runs that are still to do, the locks and the lease that this process holds for them."""

    def __init__(
        self,
        root: Root,
        runs: list[tuple[RunPaths, int]],
        lease: int | None,
        word: int,
        *,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.root = root
        self.left = runs
        self.lease = lease
        self.current = runs[0][0]
        self._word: int | None = word
        self._ids = [run.id for run, _ in runs]
        for fd in [lock for _, lock in runs] + ([] if lease is None else [lease]):
            os.set_inheritable(fd, False)
        self._me = {"pid": os.getpid(), "ticks": _ticks(), "boot_id": boot_id(), "since": time.time()}
        self._me["subreaper"] = become_subreaper()
        self._me |= identity or {"runner": "detached"}
        self._job: Job | None = None
        self.stopping: str | None = None
        """Why all of it is to end; set from a signal handler."""

    def sign(self) -> None:
        """Leave in every run of the chain who takes care of it."""
        for run, _ in self.left:
            write_json(run.supervisor, {**self._me, "chain": self._ids})

    def say(self, word: dict[str, Any]) -> None:
        """Tell the launcher, once, how the first run got on."""
        if self._word is None:
            return
        with contextlib.suppress(OSError):
            os.write(self._word, b"\n" + json.dumps({"pid": os.getpid(), **word}).encode() + b"\n\0")
        os.close(self._word)
        self._word = None

    def go(self) -> None:
        """Run by run until the end, the first that does not pass, or a cancel of one that waits."""
        while self.left:
            run, lock = self.left[0]
            if not self._obtain_device(run):
                continue
            self.current, self.left = run, self.left[1:]
            self._job = Job(
                run,
                lock,
                self.lease if wants_device(run) else None,
                started=self._started,
                idle=self._look_around,
                runner=str(self._me["runner"]),
            )
            outcome = self._job.execute(before_exit=self._stop_after)
            self._job = None
            # Before the run's own lock: whoever sees it finished may want the device at once.
            if self.lease is not None and not any(wants_device(later) for later, _ in self.left):
                locks.release(self.lease)
                self.lease = None
            self.say({})
            locks.release(lock)
            if outcome != "pass":
                return

    def _started(self, pid: int) -> None:
        run = self.current
        if self.lease is not None and wants_device(run):
            holder = self._holder(run, pid)
            locks.note_holder(self.lease, holder)
            with contextlib.suppress(OSError):
                write_json(run.lease, {"device": holder})
        self.say({})

    def _holder(self, run: RunPaths, pid: int) -> dict[str, Any]:
        return {**self._me, "run": run.id, "pid": pid, "supervisor_pid": os.getpid(), "since": time.time()}

    def _obtain_device(self, run: RunPaths) -> bool:
        """Hold the device when `run` wants it, waiting if need be; False when the chain changed meanwhile."""
        while self.lease is None and wants_device(run):
            self.say({})
            self.lease = locks.take(self.root.device_lock, patience=_LEASE_PAUSE)
            self._look_around()
            if not self.left or self.left[0][0] is not run:
                return False
        if self.lease is not None:
            locks.note_holder(self.lease, self._holder(run, os.getpid()))
        return True

    def _look_around(self) -> None:
        """Drop a waiting run that somebody cancelled, and what was to follow it; end all when that was asked for."""
        if self.stopping is not None:
            self._drop(0, self.stopping, None)
            if self._job is not None:
                self._job.stop.begin("signal", self.stopping, STOP_GRACE)
            return
        for position, (run, _) in enumerate(self.left):
            if run.cancel.is_file():
                self._drop(position, f"{run.id} was cancelled before it started", read_json(run.cancel))
                return

    def _stop_after(self, run: RunPaths, outcome: str) -> None:
        if outcome != "pass":
            self._drop(0, f"{run.id} ended with {outcome}", None)

    def _drop(self, position: int, reason: str, cancel: dict[str, Any] | None) -> None:
        dropped, self.left = self.left[position:], self.left[:position]
        for run, lock in reversed(dropped):  # whoever sees the first gone must not find the ones behind it
            if never_started(run):
                if run is not self.current:
                    with contextlib.suppress(OSError):
                        journal.record(
                            self.current, "reservation-removed", removed=run.id, reason=reason, cancel=cancel
                        )
                remove(run)
            locks.release(lock)


def _ticks() -> int | None:
    me = look(os.getpid())
    return None if me is None else me.ticks
