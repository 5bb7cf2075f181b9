"""Repeating a call whose connection broke: every verb is idempotent, so that is safe; nothing else is repeated."""

from __future__ import annotations

from typing import Any

from dispatch.transport.call import CALL_SECONDS, READING, Reply, Transport
from dispatch.transport.link import HostKeyError, LinkError, LinkLostError
from latentforge.errors import UnknownOutcomeError
from latentforge.verdicts import ExitCode

ATTEMPTS = 4


def call(
    transport: Transport, verb: str, args: dict[str, Any], payload: bytes = b"", *, timeout: float = CALL_SECONDS
) -> Reply:
    """One call, repeated with growing waits while the connection breaks.

    A failure to connect is not repeated: nothing was sent, and its cause (a name, a key, a port) does not pass by
    itself. Once something may have been sent, a connection that stays lost leaves an unknown outcome (exit code 3).
    """
    try:
        return transport.call(verb, args, payload, timeout=timeout)
    except LinkLostError as error:
        return _again(error, transport, verb, args, payload, timeout)


def _again(
    first: LinkLostError, transport: Transport, verb: str, args: dict[str, Any], payload: bytes, timeout: float
) -> Reply:
    """The further attempts of a call whose connection broke."""
    # It brings asyncio along: only a link that breaks waits for that.
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

    lost: list[LinkLostError] = []
    met = [first]

    def attempt() -> Reply:
        if met:
            raise met.pop()
        return transport.call(verb, args, payload, timeout=timeout)

    def remember(state: Any) -> None:
        error = state.outcome.exception()
        if isinstance(error, LinkLostError):
            lost.append(error)

    retrying = Retrying(
        retry=retry_if_exception_type(LinkLostError),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential_jitter(multiplier=0.3, max=5.0, jitter=0.5),
        after=remember,
        reraise=True,
    )
    try:
        reply: Reply = retrying(attempt)
    except HostKeyError as error:
        if lost and verb not in READING:
            error.code = ExitCode.UNKNOWN
        raise
    except LinkError as error:
        # Lost first and then not to be had again: something may have been sent all the same, unless it only asked.
        if not lost or (verb in READING and not isinstance(error, LinkLostError)):
            raise
        times = f" ({ATTEMPTS} times)" if isinstance(error, LinkLostError) else f", after {lost[-1]}"
        raise UnknownOutcomeError(
            f"{error}{times}; whether {verb!r} was done there is not known",
            next="the same command again: what was done is found and kept",
        ) from error
    return reply
