"""Sixty-four clients at once: no error, every text as by itself, memory flat, and /health answered meanwhile."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from .conftest import Running

CLIENTS = 64
QUESTIONS = [
    {"prompt": f"def f{number}(a, b):\n" + "    a += 1\n" * (3 * number), "max_tokens": 12 + 9 * number, "seed": number}
    for number in range(6)
]


@dataclass
class Load:
    """What came of it: answers, those that were not as they ought to be, seconds of /health, bytes of the server."""

    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    @property
    def p99(self) -> float:
        return sorted(self.health)[int(0.99 * len(self.health))]

    def __str__(self) -> str:
        megabytes = [round(value / 2**20) for value in (self.memory[0], self.memory[-1], max(self.memory))]
        return (
            f"{self.answers} answers to {CLIENTS} clients, {len(self.wrong)} wrong; /health {len(self.health)} times, "
            f"p99 {1000 * self.p99:.1f} ms, longest {1000 * max(self.health):.1f} ms; memory {megabytes[0]} MiB at "
            f"first, {megabytes[1]} at last, {megabytes[2]} at most"
        )


async def ask(client: httpx2.AsyncClient, question: dict[str, Any], stream: bool) -> str:
    body = {"model": "tiny", **question, "stream": stream}
    if not stream:
        answer = await client.post("/v1/completions", json=body)
        return str(answer.json()["choices"][0]["text"]) if answer.status_code == 200 else answer.text
    found = []
    async with client.stream("POST", "/v1/completions", json=body) as events:
        async for line in events.aiter_lines():
            if line and line != "data: [DONE]":
                found.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
    return "".join(found)


async def load(server: Running, seconds: float) -> Load:
    """All clients ask, one question after the other, each second one for a stream, until the time is over."""
    alone = [server.completion(**question)["choices"][0]["text"] for question in QUESTIONS]
    found, process = Load(), psutil.Process(server.process.pid)
    limits = httpx2.Limits(max_connections=CLIENTS + 1)
    async with httpx2.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:

        async def one(number: int, over: Callable[[int], bool]) -> None:
            turn = 0
            while not over(turn):
                which = (number + turn) % len(QUESTIONS)
                text = await ask(client, QUESTIONS[which], stream=bool((number + turn) % 2))
                found.answers += 1
                if text != alone[which]:
                    found.wrong.append(f"question {which}: {text!r}, alone {alone[which]!r}")
                turn += 1

        async def watch() -> None:
            while True:
                found.memory.append(process.memory_info().rss)
                await asyncio.sleep(0.5)

        await asyncio.gather(*[one(number, lambda turn: turn >= 1) for number in range(CLIENTS)])  # warm
        watching, end = asyncio.create_task(watch()), time.monotonic() + seconds
        await asyncio.gather(*[one(number, lambda _: time.monotonic() >= end) for number in range(CLIENTS)])
        watching.cancel()
    return found


def under_load(server: Running, seconds: float) -> Load:
    command = [sys.executable, str(Path(__file__).with_name("probe.py")), server.url.rpartition(":")[2]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as probe:
        found = asyncio.run(load(server, seconds))
        found.health = json.loads(probe.communicate()[0])
        assert probe.returncode == 0
    print(found)
    return found


def check(found: Load, server: Running, margin: int) -> None:
    assert found.wrong == []
    assert found.answers >= 2 * CLIENTS
    assert len(found.health) > 10
    assert max(found.memory) - found.memory[0] < margin
    figures = server.until(lambda figures: figures["latentforge_batch_size"] == 0)
    assert figures["latentforge_queue_length"] == 0


def test_sixty_four_clients_get_no_error_and_memory_stays_flat(
    server: Running, record_property: Callable[[str, object], None]
) -> None:
    """Speed is reported and not asserted here: the machine may be busy with anything."""
    found = under_load(server, 10)
    record_property("load", str(found))
    check(found, server, 64 << 20)


@pytest.mark.soak
def test_soak_health_is_answered_within_a_tenth_of_a_second_under_load(server: Running) -> None:
    found = under_load(server, 60)
    check(found, server, 64 << 20)
    assert found.p99 < 0.1
