"""Executable checks of contracts/serving.yaml, on a server's own parts with a model that waits until it is let."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from starlette.requests import Request as Asked
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from latentforge.contracts.finding import Finding
from latentforge.serve.asking import CompletionAsk, parse
from latentforge.serve.engine import Engine, Order
from latentforge.serve.limits import Limits
from latentforge.serve.measures import Measures
from latentforge.serve.preparing import completion_choices, deadline_of
from latentforge.serve.refusing import Refusal
from latentforge.serve.talking import read_body
from latentforge.students.latent.requests import Request

_LIMITS = Limits(max_batch=2, queue=3, max_prompt=8, max_tokens=6, max_draws=5, max_body=256, deadline=2.0)
_BEYOND = 1000


class _Waiting:
    """A model of chunks of two tokens whose steps wait for ``let``; its sessions are itself."""

    chunk, eos_id, vocab_size = 2, 0, 50
    tempered = completes = greedy = True

    def __init__(self) -> None:
        self.let = threading.Event()

    def begin(self, texts: Any) -> _Waiting:
        return self

    def draw(self, rows: Tensor, keys: Any, first: int, count: int, temperature: float) -> Tensor:
        self.let.wait()
        return torch.ones(len(rows), count, 2, dtype=torch.int64)

    def keep(self, rows: Tensor) -> None:
        """It holds nothing of them."""

    def advance(self, chunks: Tensor) -> None:
        """It holds nothing of them."""

    def join(self, other: _Waiting) -> None:
        """It holds nothing of them."""


def _writer() -> Any:
    backend = Tokenizer(WordLevel({f"t{number}": number for number in range(50)}, unk_token="t1"))
    return SimpleNamespace(model=_Waiting(), kind="latent", tokenizer=SimpleNamespace(backend=backend))


def limits_hold(*, mutant: str | None = None) -> Finding:
    """Each limit of a request: what is at the limit is accepted, what is one beyond it is refused and its field named.

    Mutant ``unlimited``: a server that was given limits out of reach, and so looks at none of them.
    """
    if mutant not in (None, "unlimited"):
        raise ValueError(f"unknown mutant {mutant!r}")
    high = dict.fromkeys(("max_prompt", "max_tokens", "max_draws", "max_body", "queue", "deadline"), _BEYOND)
    limits = replace(_LIMITS, **high) if mutant else _LIMITS  # type: ignore[arg-type]
    writer = _writer()
    # The field, its value at the limit, and one beyond.
    cases: list[tuple[str, Any, Any]] = [
        ("prompt", [1] * _LIMITS.max_prompt, [1] * (_LIMITS.max_prompt + 1)),
        ("max_tokens", _LIMITS.max_tokens, _LIMITS.max_tokens + 1),
        ("draws", _LIMITS.max_draws, _LIMITS.max_draws + 1),
        ("n", _LIMITS.texts, _LIMITS.texts + 1),
        ("deadline", _LIMITS.deadline, _LIMITS.deadline + 0.5),
    ]
    wrong = []
    for field, within, beyond in cases:
        for value, wanted in ((within, None), (beyond, (400, field))):
            body = {"model": "m", "prompt": [1, 2], "seed": 1, "method": "vote", field: value}

            def prepare(body: dict[str, Any] = body) -> None:
                asked = parse(CompletionAsk, json.dumps(body).encode())
                completion_choices(asked, writer, limits)
                deadline_of(asked, limits)

            if (said := _refusal(prepare)) != wanted:
                wrong.append(f"{field} = {len(value) if isinstance(value, list) else value}: {said}")
    for size, wanted in ((_LIMITS.max_body, None), (_LIMITS.max_body + 1, (413, None))):
        if (said := _refusal(lambda size=size: asyncio.run(read_body(_posted(size), limits.max_body)))) != wanted:
            wrong.append(f"a body of {size} bytes: {said}")
    count = 2 * len(cases) + 2
    text = f"{count - len(wrong)} of {count} requests at and beyond a limit answered as they must be"
    return Finding(not wrong, text + (f"; {wrong[0]}" if wrong else ""), {"requests": count, "wrong": wrong})


def _refusal(call: Any) -> tuple[int, str | None] | None:
    try:
        call()
    except Refusal as refusal:
        return refusal.status, refusal.field
    return None


def _posted(size: int) -> Asked:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b" " * size, "more_body": False}

    headers = [(b"content-type", b"application/json")]
    return Asked({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)


def queue_is_bounded(*, mutant: str | None = None) -> Finding:
    """Texts beyond those that are written and those that may wait are refused with 429, and what waits is written.

    Mutant ``endless``: a queue that takes all that comes.
    """
    if mutant not in (None, "endless"):
        raise ValueError(f"unknown mutant {mutant!r}")
    limits = replace(_LIMITS, queue=_BEYOND) if mutant else _LIMITS
    room = _LIMITS.max_batch + _LIMITS.queue
    model, ready, done = _Waiting(), threading.Event(), threading.Semaphore(0)
    opened: Any = SimpleNamespace(model=model)
    engine = Engine(lambda: opened, limits, Measures(), lambda what: what(), ready.set)
    engine.start()
    ready.wait()
    accepted, statuses = 0, []
    try:
        for number in range(2 * room):
            order = Order(
                Request((1, 2), 2, number),
                time.monotonic() + 3600,
                lambda event: done.release() if event.end else None,  # type: ignore[func-returns-value]
            )
            refused = _refusal(lambda order=order: engine.submit([order]))
            accepted += refused is None
            statuses += [] if refused is None else [refused[0]]
        model.let.set()
        written = sum(done.acquire(timeout=60) for _ in range(accepted))
    finally:
        model.let.set()
        engine.stop(0)
        engine.ended.wait(60)
    passed = accepted == written == room and set(statuses) == {429}
    text = f"{accepted} of {2 * room} texts accepted where {room} have room, {written} of them written"
    return Finding(passed, text, {"accepted": accepted, "room": room, "written": written, "statuses": statuses})
