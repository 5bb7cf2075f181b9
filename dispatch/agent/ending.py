"""How a job ended, told apart: its outcome for the exit code, its class for people, and a reason where there is one."""

from __future__ import annotations

import time
from signal import SIGHUP, SIGINT, SIGTERM, Signals
from typing import Any, NamedTuple

from . import exitrec, journal, locks
from .memory_evidence import SIGKILL
from .paths import RunPaths
from .processes import boot_clock, boot_id
from .protocol import CRASHED
from .state import outcome_of

LONGEST_REASON = 300
ASKS_TO_STOP = (SIGTERM, SIGINT, SIGHUP)
"""By these nothing crashes: somebody sent them, and they end a process only before it has a handler for them."""


class Ending(NamedTuple):
    """What the exit record says of an end: the outcome, its class, and a reason."""

    outcome: str
    kind: str
    reason: str | None


def judge(
    code: int | None,
    signal: int | None,
    *,
    failure: str | None = None,
    cancelled: bool = False,
    stopped: tuple[str, str] | None = None,
    oom: bool | None = None,
    evidence: str | None = None,
) -> Ending:
    """The end of a job by its exit status and what is known beside it.

    `failure` says why it could not be started; `stopped` is the class and the reason of an end that its supervisor
    made. A SIGKILL is called out of memory only where the kernel or the control group says so.
    """
    if failure is not None:
        return Ending("cancelled" if cancelled else "crashed", "not-started", failure)
    if cancelled:
        return Ending("cancelled", "cancelled", None)
    if stopped is not None:
        return Ending("killed", *stopped)  # whatever code it made of its TERM, it was not allowed to finish
    if signal is not None:
        if oom:
            return Ending("killed", "oom", f"out of memory: {evidence}")
        if signal in ASKS_TO_STOP:
            return Ending("unknown", "stopped", f"interrupted by {Signals(signal).name} before it could end in order")
        return Ending("killed", "killed-unknown" if signal == SIGKILL else "signal", None)
    meanwhile = f"meanwhile a process was killed for memory: {evidence}" if code and evidence else None
    return Ending(outcome_of(code, None), "exited", meanwhile)


def may_begin_again(kind: str, code: int | None) -> bool:
    """Whether a run that ended so may go on from its last checkpoint: it crashed by itself, nobody ended it, and it was
    not memory that it lacked, which it would lack again. Any code but that of a crash is an end that it told itself."""
    return kind in ("signal", "killed-unknown") or (kind == "exited" and code == CRASHED)


def write_for_the_dead(
    run: RunPaths,
    outcome: str,
    kind: str,
    reason: str,
    *,
    cancel: dict[str, Any] | None = None,
    runner: str = "detached",
) -> bool:
    """Record the end of a job that no supervisor saw, as far as it is known; False where that is not ours to say."""
    lock = locks.take(run.lock)
    if lock is None:
        return False
    try:
        if exitrec.read(run.exit) is not None:
            return False
        started = journal.read(run).started or {}
        exitrec.write(
            run.exit,
            {
                "schema": 1,
                "run": run.id,
                "runner": runner,
                "code": None,
                "signal": None,
                "outcome": outcome,
                "class": kind,
                "reason": reason[:LONGEST_REASON],
                "oom": True if kind == "oom" else None,
                "cancel": cancel,
                "started": started.get("wall"),
                "ended": time.time(),
                "seconds": boot_clock() - float(started.get("clock", boot_clock())),
                "boot_id": boot_id(),
                "artifacts": None,
            },
        )
        return True
    finally:
        locks.release(lock)
