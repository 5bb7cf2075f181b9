"""The exit codes that every command shares."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a process tells its caller; repeating a finished run returns the code that the run earned."""

    PASS = 0
    FAIL = 1  # a falsifier, a check, an unfit host
    REFUSED = 2  # usage, or a refused specification
    UNKNOWN = 3  # lost, interrupted, unreachable: the outcome of a possibly started run is not known
    STALLED = 4  # no progress, deadline, or a log that never appeared
    CRASHED = 5  # the run's own code or signal, and cancel
    TRANSPORT = 6  # nothing was sent: name, route, host key, authentication
    BUSY = 7  # the lease is held by another run
    DETACHED = 130  # Ctrl-C: the run goes on

    @property
    def outranks_fail(self) -> bool:
        """Whether this code hides a failed falsifier (stalled, crashed and transport do)."""
        return self in (ExitCode.STALLED, ExitCode.CRASHED, ExitCode.TRANSPORT)
