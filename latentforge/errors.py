"""Errors that a user can act on: what was refused, why, and the next command to type."""

from __future__ import annotations

from latentforge.verdicts.exitcode import ExitCode


class LatentForgeError(Exception):
    """An expected failure, shown without a traceback.

    The message names the refused value and says why; ``next`` is what to do about it, ``code`` the exit status.
    """

    default_code = ExitCode.REFUSED

    def __init__(self, what: str, *, next: str | None = None, code: ExitCode | None = None) -> None:
        super().__init__(what)
        self.next = next
        self.code = self.default_code if code is None else code


class RefusedError(LatentForgeError):
    """A specification, file or argument that is not accepted (exit code 2)."""


class FailedError(LatentForgeError):
    """A check that was made and did not hold (exit code 1)."""

    default_code = ExitCode.FAIL


class UnknownOutcomeError(LatentForgeError):
    """The outcome of something that may have started is not known (exit code 3)."""

    default_code = ExitCode.UNKNOWN


class CrashedError(LatentForgeError):
    """A run's own code ended by an error or a signal (exit code 5)."""

    default_code = ExitCode.CRASHED


class TransportError(LatentForgeError):
    """The host could not be reached or trusted; nothing was sent (exit code 6)."""

    default_code = ExitCode.TRANSPORT


class BusyError(LatentForgeError):
    """Another run holds the lease (exit code 7)."""

    default_code = ExitCode.BUSY
