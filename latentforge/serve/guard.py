"""What every request passes first: its figures, who may ask from where, and the key."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from latentforge.serve.measures import Measures
from latentforge.serve.refusing import Refusal

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = ("/health", "/ready")
"""Probes have no key, and are told nothing of the model."""


class Measured:
    """Counts what is answered and how long that takes, by path and status; ``paths`` are named, the others together."""

    def __init__(self, app: App, measures: Measures, paths: Collection[str]) -> None:
        self._app, self._measures, self._paths = app, measures, frozenset(paths)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"
        began, status = time.monotonic(), "none"

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            self._measures.requests.labels(path, status).inc()
            self._measures.request_seconds.labels(path).observe(time.monotonic() - began)


class Guard:
    """Refuses a request without the key but for ``open_paths``, and, where there is no key, one under a foreign name of
    this machine.

    ``hosts`` are the names of a server that needs no key: a page whose own name was pointed at this machine (DNS
    rebinding) sends its name. None where any is accepted.
    """

    def __init__(
        self, app: App, *, key: str | None, hosts: Collection[str] | None, open_paths: Collection[str]
    ) -> None:
        self._app, self._open = app, frozenset(open_paths)
        self._key = None if key is None else _digest(key.encode())
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope["path"], Headers(raw=scope["headers"]))
            except Refusal as refusal:
                answer = JSONResponse(refusal.body, refusal.status, refusal.headers)
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "").rpartition("@")[2].lower()
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if self._hosts is not None and name not in self._hosts:
            raise Refusal(421, "this server does not go by that name; ask for 127.0.0.1", field="Host", code="host")
        if self._key is None or path in self._open:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Digests of equal length: neither where the two differ nor how long the key is shows in the time.
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip().encode("latin-1")), self._key):
            raise Refusal(401, "the API key is missing or wrong", field="Authorization", code="invalid_api_key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
