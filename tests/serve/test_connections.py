"""Connections on which nothing is asked are given up; those whose requests are being answered are not."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from latentforge.serve.connections import Connection

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"


@pytest.mark.timeout(60)
def test_a_connection_on_which_nothing_is_asked_is_closed_and_one_that_waits_for_its_answer_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("latentforge.serve.connections.ASK_SECONDS", 1.0)

    async def ask() -> None:
        asked, let = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, _: Any, send: Any) -> None:
            if scope["path"] == "/slow":
                asked.set()
                await let.wait()
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body"})

        config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, timeout_keep_alive=3600)
        config.load()
        state, loop = ServerState(), asyncio.get_running_loop()
        async with await loop.create_server(lambda: Connection(config, state, {}), "127.0.0.1", 0) as server:
            address = server.sockets[0].getsockname()
            slow, answer = await asyncio.open_connection(*address)
            answer.write(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asked.wait()

            async def closed(*parts: bytes) -> None:
                reader, writer = await asyncio.open_connection(*address)
                for part in parts:
                    writer.write(part)
                    if part == HEAD:  # answered before its body was there, which then comes byte by byte
                        assert b"401" in await reader.readuntil(b"\r\n\r\n")
                with suppress(ConnectionResetError):
                    assert await reader.read() == b""
                writer.close()

            await asyncio.gather(closed(), closed(b"GET / HT"), closed(HEAD, b"x"))
            # All of those began later: the time of this one is over too.
            let.set()
            assert b"401" in await slow.readuntil(b"\r\n\r\n")
            assert await slow.read() == b""
            answer.close()

    asyncio.run(ask())
