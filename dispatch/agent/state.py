"""What a run's state is, derived from what is on the host at the moment of asking; nothing here is ever stored."""

from __future__ import annotations

import time
from typing import Any

from . import exitrec, journal, locks
from .durable import read_json
from .paths import RunPaths
from .processes import boot_clock, boot_id, is_alive
from .protocol import CRASHED, FAIL, PASS, REFUSED, UNKNOWN

#: States in which nothing more will happen to a run by itself.
RESTING = frozenset({"absent", "reserved", "finished", "lost", "interrupted"})
#: Events of a journal that tell what a supervisor found amiss while its job goes on.
WARNINGS = frozenset({"memory-low", "disk-low", "watchdog-blind"})
_EXIT_CODES = {
    "pass": PASS,
    "fail": FAIL,
    "refused": REFUSED,
    "unknown": UNKNOWN,
    "crashed": CRASHED,
    "killed": CRASHED,
    "cancelled": CRASHED,
}


def exit_code(outcome: str | None) -> int:
    """The command line's exit code for a run's outcome; whatever is not a known outcome is unknown, never pass."""
    return _EXIT_CODES.get(outcome or "", UNKNOWN)


def outcome_of(code: int | None, signal: int | None) -> str:
    """The outcome that a job's own exit status means."""
    if signal is not None:
        return "killed"
    return {0: "pass", 1: "fail", 2: "refused", 3: "unknown"}.get(-1 if code is None else code, "crashed")


def derive(run: RunPaths, *, boot: str | None = None) -> dict[str, Any]:
    """The RunState of `run` (see the table in this package's docstring); `boot` stands in for this boot's id in tests.

    The order of the looks is what makes it right: journal, lock, supervisor, exit record. A supervisor takes the lock,
    journals, writes the record, lets go; so "no record" seen after "lock free" seen after "started" is really lost.
    """
    boot = boot_id() if boot is None else boot
    if not run.identity.is_file():
        return _report(run, "absent")
    past = journal.read(run)
    held = locks.held(run.lock)
    supervisor = read_json(run.supervisor) or {}
    supervised = supervisor.get("boot_id") == boot and is_alive(supervisor.get("pid"), supervisor.get("ticks"))
    ended = exitrec.read(run.exit)
    known: dict[str, Any] = {"supervisor": supervisor, "supervised": supervised, "past": past}
    if ended is not None and ended.get("run") == run.id:
        return _report(run, "finishing" if held else "finished", ended=ended, **known)
    started = past.started
    if started is not None and started.get("boot_id") != boot:
        return _report(run, "interrupted", **known)
    if held:
        if started is not None:
            return _report(run, "running" if supervised else "unsupervised", **known)
        return _report(run, "queued" if past.launching is None else "starting", **known)
    if not run.identity.is_file():  # removed while we looked
        return _report(run, "absent")
    # A job passes its gate only after `started` is on disk: without that line it never ran.
    return _report(run, "reserved" if started is None else "lost", **known)


def _report(
    run: RunPaths,
    state: str,
    *,
    ended: dict[str, Any] | None = None,
    supervisor: dict[str, Any] | None = None,
    supervised: bool = False,
    past: journal.Journal | None = None,
) -> dict[str, Any]:
    started = past.started if past is not None else None
    report: dict[str, Any] = {
        "run": run.id,
        "state": state,
        "code": None,
        "signal": None,
        "oom": None,
        "class": None,
        "outcome": None,
        "exit": None,
        "reason": None,
        "started": started["wall"] if started else None,
        "ended": None,
        "seconds": None,
        "chain": (supervisor or {}).get("chain", []),
        "pid": started["pid"] if started else None,
        "supervisor_pid": (supervisor or {}).get("pid") if supervised else None,
        "cancel_requested": run.cancel.is_file(),
        "beat_age": None,
        "beat": None,
        "warning": None,
    }
    if ended is not None:
        for name in ("code", "signal", "oom", "class", "outcome", "reason", "started", "ended", "seconds"):
            report[name] = ended.get(name)
        report["exit"] = exit_code(ended.get("outcome"))
        report["supervisor_pid"] = None  # it has nothing more to do for this run
        if state == "finishing" and (left := ended.get("survivors")):
            report["reason"] = f"it has ended ({report['outcome']}), but its processes {left} could not be ended"
    elif state in ("lost", "interrupted"):
        report["outcome"], report["exit"] = "unknown", UNKNOWN
        report["reason"] = (
            "its supervisor and its process are gone without an exit record"
            if state == "lost"
            else "the host was restarted while it ran"
        )
    elif state in ("running", "unsupervised") and started:
        report["seconds"] = max(0.0, boot_clock() - float(started["clock"]))
        beat = exitrec.read(run.beat)
        if beat is not None:
            report["beat_age"] = max(0.0, boot_clock() - float(beat["clock"]))
            report["beat"] = beat
        if past is not None:
            report["warning"] = next(
                (e.get("reason") for e in reversed(past.events) if e.get("event") in WARNINGS), None
            )
        if state == "unsupervised":
            report["reason"] = "its supervisor is gone; it goes on, but its exit status will not be known"
    return report


def clock() -> dict[str, float]:
    """Both clocks of this host, in seconds."""
    return {"wall": time.time(), "boot": boot_clock()}
