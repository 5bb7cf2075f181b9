"""Tokens as they come, turned into the text of an answer: whole characters alone, cut before a stop string."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from latentforge.data.tokenizer import Tokenizer
from latentforge.serve.engine import Engine, Event, Order
from latentforge.serve.refusing import Refusal
from latentforge.students.latent.requests import Request
from latentforge.students.latent.text import TextStream

Finish = Literal["eos", "stop", "length", "failed", "deadline", "stopping", "broken"]


class Stops:
    """Text up to the first of ``stops`` in it; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""
        self.found = False

    def push(self, text: str, *, last: bool = False) -> str:
        """What of the text is certain now, and was not said before; nothing once one was ``found``."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = 0 if last else self._begun(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _begun(self, text: str) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - size :]) for stop in self._stops):
                return size
        return 0


class Choice:
    """One text of an answer, as far as it is there; ``tokens`` are those that were produced, the end's included.

    ``finish`` is None while it goes on; ``error`` says why it failed.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: str | None, request: Request, *, index: int, stops: Sequence[str]
    ) -> None:
        self.index, self.request = index, request
        ids = list(request.prompt)
        self.prompt = tokenizer.backend.decode(ids, skip_special_tokens=True) if prompt is None else prompt
        self.text, self.tokens, self.draws, self.steps = "", list[int](), 0, 0
        self.finish: Finish | None = None
        self.error = ""
        self.logprobs: list[float] = []
        self._backend = tokenizer.backend
        self._stream, self._stops = TextStream(tokenizer.backend, ids), Stops(stops)

    def take(self, event: Event) -> str:
        """The text that an event adds."""
        self.tokens += event.tokens
        self.draws += event.draws
        self.steps += bool(event.tokens)
        said = self._stream.push(event.tokens)
        if event.end is not None:
            said += self._stream.end()
        new = self._stops.push(said, last=event.end is not None)
        self.text += new
        if self._stops.found:
            self.finish = "stop"
        elif event.end is not None and event.end != "cancelled":
            self.finish, self.error = event.end, event.error
        return new

    @property
    def score(self) -> float:
        """The mean log-probability of its tokens."""
        own = self.logprobs[len(self.request.prompt) :]
        return sum(own) / len(own)

    def scored_tokens(self, *, echo: bool) -> dict[str, Any]:
        """OpenAI's ``logprobs`` of the tokens of the text, with ``echo`` of the prompt's too. A token's text is what it
        makes certain: nothing for the first bytes of a character, and all texts together are the answer's."""
        stream, ids = TextStream(self._backend), (*self.request.prompt, *self.tokens)
        texts = [stream.push([token]) for token in ids]
        texts[-1] += stream.end()
        if not echo:
            texts, ids = texts[len(self.request.prompt) :], tuple(self.tokens)
        ends = list(itertools.accumulate(len(text) for text in texts))
        offsets = [0, *ends[:-1]]
        length = len(self.text) + (len(self.prompt) if echo else 0)
        kept = [place for place in range(len(ids)) if self.finish != "stop" or offsets[place] < length]
        return {
            "tokens": [texts[place] for place in kept],
            "token_logprobs": [self.logprobs[len(self.logprobs) - len(ids) + place] for place in kept],
            "top_logprobs": None,
            "text_offset": [offsets[place] for place in kept],
        }


class Conversation:
    """The texts of one request while they are written. ``close`` ends the work on what nobody waits for."""

    def __init__(self, engine: Engine, choices: Sequence[Choice], until: float) -> None:
        self.choices, self._engine = choices, engine
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._orders = {choice.index: Order(choice.request, until, self._inbox.put_nowait) for choice in choices}
        self._choice_of = {order.number: choice for choice in choices for order in (self._orders[choice.index],)}
        engine.submit(list(self._orders.values()))

    async def pieces(self) -> AsyncIterator[tuple[Choice, Event, str]]:
        """Each choice that a step gave something, what that was, and the text that it adds; until all are over."""
        while any(choice.finish is None for choice in self.choices):
            event = await self._inbox.get()
            choice = self._choice_of[event.order.number]
            if choice.finish is not None:
                continue
            said = choice.take(event)
            if choice.finish == "stop":
                self._engine.give_up([event.order])
            yield choice, event, said

    async def finish(self) -> None:
        """Wait until all are over; a Refusal where one has failed."""
        async for choice, _, _ in self.pieces():
            refuse_failed(choice)

    async def score(self) -> None:
        """Give each choice the ``logprobs`` of its prompt's and its own tokens; a Refusal where that fails."""
        done: asyncio.Queue[list[float] | None] = asyncio.Queue()
        for choice in self.choices:
            self._engine.score((*choice.request.prompt, *choice.tokens), done.put_nowait)
            found = await done.get()
            if found is None:
                raise Refusal(503, "the text was written and could not be scored any more", code="stopping")
            choice.logprobs = found

    def close(self) -> None:
        """Give up what is not over yet."""
        self._engine.give_up([self._orders[choice.index] for choice in self.choices if choice.finish is None])


def refuse_failed(choice: Choice) -> None:
    """A Refusal where there is no text to answer with, or none that can be trusted."""
    if choice.finish == "failed" and choice.request.sampling.method == "exact":
        raise Refusal(422, choice.error, field="draws", code="not_settled")
    if choice.finish in ("failed", "broken"):
        raise Refusal(500, "the text could not be written", code="failed")
    if choice.finish == "deadline" and not choice.tokens:
        raise Refusal(504, "the deadline passed before the first chunk was written", field="deadline", code="deadline")
    if choice.finish == "stopping":
        raise Refusal(503, "the server stopped before the text was written", code="stopping", retry_after=1)
