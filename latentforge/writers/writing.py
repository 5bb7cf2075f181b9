"""Texts for prompts: drawn many together and handed on as they come, or the best that can be found for each."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from latentforge.errors import LatentForgeError, RefusedError
from latentforge.students.latent.beam import GREEDY, beam_search
from latentforge.students.latent.generate import Batch, Finish, Generated
from latentforge.students.latent.requests import Request, Sampling, check_request
from latentforge.students.latent.scoring import Best, best_of, scored
from latentforge.students.latent.text import TextStream
from latentforge.writers.opening import Writer

Method = Literal["head", "exact", "vote", "tokens"]


@dataclass(frozen=True)
class Wish:
    """What is wanted of every prompt. Prompt n (from 0) has the seed ``seed + n``.

    ``best_of`` above 1 writes so many texts of each and keeps the likeliest; ``beam`` searches with that width and
    draws nothing. ``scores``: with log-probabilities of the tokens, where the student knows them.
    """

    max_tokens: int
    sampling: Sampling
    seed: int = 0
    best_of: int = 1
    beam: int | None = None
    batch: int = 8
    scores: bool = False


class Said(NamedTuple):
    """A part of the text of prompt ``number``: ``text`` that is certain now, and the ``tokens`` of one step."""

    number: int
    text: str
    tokens: tuple[int, ...]


class Written(NamedTuple):
    """The text of prompt ``number`` (without the prompt), or the ``error`` for which there is none.

    ``seconds`` from when the prompt was taken up; ``draws`` of all candidates. ``logprobs`` of each of the ``tokens``
    and ``score``, their mean, in nats; ``scores`` of all candidates where the best of several was chosen.
    """

    number: int
    prompt: str
    prompt_tokens: tuple[int, ...]
    text: str
    tokens: tuple[int, ...]
    finish: Finish
    steps: int
    draws: int
    seconds: float
    logprobs: tuple[float, ...] | None = None
    scores: tuple[float, ...] | None = None
    error: LatentForgeError | None = None

    @classmethod
    def of(
        cls,
        number: int,
        prompt: str,
        text: str,
        found: Generated,
        seconds: float,
        logprobs: tuple[float, ...] | None,
        error: LatentForgeError | None = None,
    ) -> Written:
        """That of a text which was ``found``."""
        how = (found.tokens, found.finish, found.steps, found.draws, seconds, logprobs)
        return cls(number, prompt, found.prompt, text, *how, error=error)

    @property
    def score(self) -> float | None:
        """The mean log-probability of a token."""
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else None


def sampling_of(
    writer: Writer,
    method: Method | None,
    *,
    temperature: float = 1.0,
    draws: int = 200,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Sampling:
    """What is asked for, for the command and the server alike; RefusedError where it cannot be.

    ``top_p`` 1 is that of all tokens: it is not set. The method, where none is named, is one draw of the head; token
    after token where the student is one of tokens or only that knows the values; a vote at temperature 0.
    """
    top_p = None if top_p == 1 else top_p
    if method is None:
        if writer.kind == "token" or top_k is not None or top_p is not None or temperature > 1:
            method = "tokens"
        else:
            method = "vote" if temperature == 0 else "head"
    return Sampling(method, temperature, draws, top_k, top_p)


def write(writer: Writer, prompts: Sequence[str], wish: Wish) -> Iterator[Said | Written]:
    """What is said of each prompt while it is written (nothing of it where several texts are compared), and then what
    was written. RefusedError before anything where a prompt, or the wish, is not possible for this writer."""
    requests = _requests(writer, prompts, wish)
    if wish.beam is None and wish.best_of == 1:
        yield from _stream(writer, prompts, requests, wish)
        return
    for number, request in enumerate(requests):
        began = time.monotonic()
        if wish.beam is not None:
            best = Best(beam_search(writer.model, request, wish.beam, number=number), (), 0)
        else:
            best = best_of(writer.model, [request], wish.best_of)[0]
        found, logprobs = best.chosen
        stream = TextStream(writer.tokenizer.backend, found.prompt)
        text = stream.push(found.tokens) + stream.end()
        done = found._replace(draws=best.draws)
        seconds = time.monotonic() - began
        yield Written.of(number, prompts[number], text, done, seconds, logprobs)._replace(scores=best.scores or None)


def _requests(writer: Writer, prompts: Sequence[str], wish: Wish) -> list[Request]:
    if wish.batch < 1:
        raise RefusedError(f"batch = {wish.batch} is less than 1")
    if (wish.scores or wish.best_of > 1 or wish.beam is not None) and not writer.model.completes:
        raise RefusedError(
            f"{writer.folder}: this student has no token head, so no probabilities of tokens to compare texts by",
            next="leave beam, best-of and scores out, or train with token_layers = 1",
        )
    sampling = GREEDY if wish.beam is not None else wish.sampling
    found = []
    for number, prompt in enumerate(prompts):
        found.append(Request(writer.encode(prompt), wish.max_tokens, wish.seed + number, sampling))
        check_request(writer.model, number, found[-1])
    return found


@dataclass
class _Going:
    """A text under way: its part so far, and how its tokens become text."""

    stream: TextStream
    began: float
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    steps: int = 0
    draws: int = 0


def _stream(writer: Writer, prompts: Sequence[str], requests: list[Request], wish: Wish) -> Iterator[Said | Written]:
    batch, waiting, going = Batch(writer.model), deque(range(len(requests))), dict[int, _Going]()
    while waiting or len(batch):
        joining = [waiting.popleft() for _ in range(min(len(waiting), wish.batch - len(batch)))]
        for number in joining:
            stream = TextStream(writer.tokenizer.backend, requests[number].prompt)
            going[number] = _Going(stream, time.monotonic())
        batch.join({number: requests[number] for number in joining})
        for piece in batch.step():
            one = going[piece.request]
            text = one.stream.push(piece.tokens)
            if piece.finish is not None:
                text += one.stream.end()
            one.text += text
            one.tokens += piece.tokens
            one.steps, one.draws = one.steps + 1, one.draws + piece.draws
            if piece.tokens:
                yield Said(piece.request, text, piece.tokens)
            if piece.finish is not None:
                del going[piece.request]
                ids = requests[piece.request].prompt
                done = Generated(ids, tuple(one.tokens), piece.finish, one.steps, one.draws)
                seconds = time.monotonic() - one.began
                logprobs = scored(writer.model, [done])[0].logprobs if wish.scores and one.tokens else None
                yield Written.of(piece.request, prompts[piece.request], one.text, done, seconds, logprobs, piece.error)
