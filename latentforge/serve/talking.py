"""HTTP under an endpoint: a body within its limit, an answer that ends with its client, a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from latentforge.serve.guard import Receive, Send
from latentforge.serve.refusing import Refusal

BODY_SECONDS = 30.0
"""For a body to arrive."""
_DRAINED = 16
"""So many times the limit is read of a body that is too long: a client that is cut off does not read the answer."""
Answer = TypeVar("Answer")


class Gone(Exception):
    """The client is not there any more."""


async def read_body(request: Request, limit: int) -> bytes:
    """The JSON of a request; a Refusal: 413 where it is longer than ``limit`` bytes, 415 where it is no JSON, 408
    where it does not arrive in time. Gone where the client leaves before its end."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form of another site's page could send anything else without being asked
        raise Refusal(415, "the body's type is not application/json", field="Content-Type", code="media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "the body is compressed: send it as it is", field="Content-Encoding", code="media_type")
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    parts.append(part)
                elif size > _DRAINED * limit:
                    break
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {BODY_SECONDS:g} s", code="slow_body") from None
    except ClientDisconnect:
        raise Gone from None
    if size > limit:
        raise Refusal(413, f"the body is longer than {limit} bytes", code="body_too_long")
    return b"".join(parts)


async def while_connected(receive: Receive, work: Awaitable[Answer], *, seconds: float | None = None) -> Answer:
    """What ``work`` gives; Gone, and the work is cancelled, once the client has left or ``seconds`` are over."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED, timeout=seconds)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. ``close`` is called however it ends; one that nobody reads for ``seconds`` is given up."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], *, close: Callable[[], None], seconds: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close, self._seconds = events, close, seconds

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await while_connected(receive, write(), seconds=self._seconds)
        except Gone:
            pass
        finally:
            self._close()
