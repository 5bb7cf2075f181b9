"""Sending content to a host: what a cut interrupted goes on where it was, and what arrives is verified there."""

from __future__ import annotations

from dispatch.transport.call import CALL_SECONDS, Transport
from dispatch.transport.link import LinkError, LinkLostError
from dispatch.transport.retry import ATTEMPTS, call
from latentforge.errors import UnknownOutcomeError

_WHOLE = 256 * 1024
"""Content up to this size is sent as one piece, without asking first."""


def send(transport: Transport, sha256: str, content: bytes) -> int:
    """Make the host hold this content; returns how many bytes of it were sent.

    A broken connection is taken up again at the byte where the host is, as often as that brings the sending forward.
    """
    if len(content) <= _WHOLE:
        call(transport, "put", {"sha256": sha256}, content)
        return len(content)
    lost: LinkLostError | None = None
    sent, best, fruitless = 0, 0, 0
    while True:
        try:
            held = transport.call("put", {"sha256": sha256, "ask": True}, timeout=CALL_SECONDS).result
            if held["there"]:
                return sent
            have = int(held["have"]) if int(held["have"]) < len(content) else 0
            fruitless = 0 if have > best else fruitless
            best = max(best, have)
            reply = transport.call("put", {"sha256": sha256, "offset": have}, content[have:], timeout=CALL_SECONDS)
            sent += len(content) - have
            if reply.result["there"]:
                return sent
            fruitless += 1
        except LinkLostError as error:
            lost = error
            fruitless += 1
        except LinkError as error:
            if lost is None:
                raise
            raise _interrupted(transport, best, len(content), f"{error}, after {lost}") from error
        if fruitless >= ATTEMPTS:
            raise _interrupted(transport, best, len(content), str(lost or "what was there before it is damaged"))


def _interrupted(transport: Transport, have: int, size: int, why: str) -> UnknownOutcomeError:
    return UnknownOutcomeError(
        f"{transport.host.name}: the sending of {size / 1e6:.1f} MB was interrupted ({why}); "
        f"at least {have / 1e6:.1f} MB are there, under no name that counts",
        next="the same command again: it sends the rest",
    )
