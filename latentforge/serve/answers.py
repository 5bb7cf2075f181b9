"""The answers of each endpoint as JSON, whole and in the events of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from latentforge.serve.asking import CompletionAsk
from latentforge.serve.preparing import candidates, prompt_tokens
from latentforge.serve.refusing import Refusal
from latentforge.serve.texts import Choice, Conversation, refuse_failed
from latentforge.writers.opening import Writer

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Served:
    """A writer under the name that clients know, since ``created`` (seconds of the epoch)."""

    writer: Writer
    name: str
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        """Another one for other weights, codec or tokenizer."""
        return "lf-" + "-".join(digest[:8] for _, digest in sorted(self.writer.digests.items()))

    def card(self) -> dict[str, Any]:
        """OpenAI's description of a model, and ours."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "latentforge", **self.facts()}

    def facts(self) -> dict[str, Any]:
        """What it is, by digests."""
        return {
            "kind": self.writer.kind,
            "chunk": self.writer.model.chunk,
            "parameters": self.writer.parameters,
            "digests": dict(self.writer.digests),
        }


class Completion:
    """One answer of /v1/completions."""

    def __init__(self, asked: CompletionAsk, served: Served, conversation: Conversation) -> None:
        self._asked, self._conversation = asked, conversation
        self._head = {
            "id": "cmpl-" + secrets.token_hex(12),
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }
        options = asked.stream_options
        self._usage_last = bool(options is not None and options.include_usage)

    async def whole(self) -> dict[str, Any]:
        """The answer once all texts are written; of more texts than are asked for, the likeliest of each prompt."""
        await self._conversation.finish()
        every, echo = self._conversation.choices, bool(self._asked.echo)
        count, wanted = candidates(self._asked), self._asked.n or 1
        if count > wanted or self._asked.logprobs is not None:
            await self._conversation.score()
        groups = [every[at : at + count] for at in range(0, len(every), count)]
        if count > wanted:
            groups = [sorted(group, key=lambda one: -one.score)[:wanted] for group in groups]
        choices = []
        for index, one in enumerate(one for group in groups for one in group):
            text = (one.prompt if echo else "") + one.text
            logprobs = None if self._asked.logprobs is None else one.scored_tokens(echo=echo)
            choices.append(_choice(index, text, one.finish, logprobs))
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """A part for each step of each text that has something to say; the usage at last, where it was asked for."""
        if self._asked.echo:
            for choice in self._conversation.choices:
                yield self._part(choice, choice.prompt)
        async for choice, _, said in self._conversation.pieces():
            refuse_failed(choice)
            if said or choice.finish is not None:
                yield self._part(choice, said)
        if self._usage_last:
            yield {**self._head, "choices": [], "usage": self._usage()}

    def _part(self, choice: Choice, said: str) -> dict[str, Any]:
        part = {**self._head, "choices": [_choice(choice.index, said, choice.finish)]}
        return {**part, "usage": None} if self._usage_last else part

    def _usage(self) -> dict[str, int]:
        prompts = prompt_tokens(self._asked, self._conversation.choices)
        produced = sum(len(one.tokens) for one in self._conversation.choices)
        return {"prompt_tokens": prompts, "completion_tokens": produced, "total_tokens": prompts + produced}


def _choice(index: int, text: str, finish: str | None, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    told = "stop" if finish == "eos" else finish
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": told}


class Generation:
    """One answer of /generate."""

    def __init__(self, served: Served, conversation: Conversation) -> None:
        self._served, self._conversation = served, conversation
        self._choice = conversation.choices[0]
        self._began = time.monotonic()
        self._first: float | None = None

    async def finish(self) -> dict[str, Any]:
        """The answer once the text is written."""
        async for _ in self.events():
            pass
        return {"text": self._choice.text, "tokens": self._choice.tokens, **self._end()}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """What each chunk adds, then what a whole answer says beside text and tokens."""
        async for choice, event, said in self._conversation.pieces():
            refuse_failed(choice)
            if self._first is None:
                self._first = time.monotonic() - self._began
            if said or event.tokens:
                yield {"text": said, "tokens": list(event.tokens), "draws": event.draws}
        yield self._end()

    def _end(self) -> dict[str, Any]:
        one, request = self._choice, self._choice.request
        return {
            "finish": one.finish,
            "prompt_tokens": len(request.prompt),
            "new_tokens": len(one.tokens),
            "chunks": one.steps,
            "draws": one.draws,
            "seed": request.seed,
            "method": request.sampling.method,
            "temperature": request.sampling.temperature,
            "seconds": {"first_chunk": self._first, "total": time.monotonic() - self._began},
            "model": {"name": self._served.name, **self._served.facts()},
        }


async def encoded(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """The lines of a stream; an error under way is its last event, and one [DONE] ends it."""
    try:
        async for event in events:
            yield line(event)
    except Refusal as refusal:
        yield line(refusal.body)
    yield DONE


def line(event: dict[str, Any]) -> bytes:
    """An event of a stream."""
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
