"""What is asked of a model that writes text, and what such a model can do: requests, and the protocols they meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.decode_settings import DecodeSettings
from latentforge.students.latent.tempered import check_temperature

METHODS = ("head", "exact", "vote", "tokens")


@dataclass(frozen=True)
class Sampling:
    """How a chunk is chosen, and with it the temperature that is possible.

    ``head``: one draw; below temperature 1 of a head that was trained on tempered text, at 0 (the likeliest chunk) of
    one that is ``greedy``. ``exact``: rejection, any temperature in (0, 1], at most ``draws`` draws a chunk. ``vote``:
    of ``draws`` draws, temperature 1/n or 0, the most frequent. ``tokens``: token after token by the token head's
    probabilities, any temperature, 0 for the likeliest; it alone knows ``top_k`` and ``top_p``, since a draw of a whole
    chunk has no probabilities of tokens. Tokens of a chunk that a prompt has begun are drawn one by one at
    ``temperature``, whatever the method.
    """

    method: Literal["head", "exact", "vote", "tokens"] = "head"
    temperature: float = 1.0
    draws: int = 200
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RefusedError(f"method = {self.method!r} is none of {', '.join(METHODS)}")
        if self.method == "head" and self.temperature > 1:
            raise RefusedError(
                f"temperature = {self.temperature}: one draw of a head knows temperatures from 0 to 1",
                next="take the method tokens for a higher one",
            )
        for name, value in (("top_k", self.top_k), ("top_p", self.top_p)):
            if value is not None and self.method != "tokens":
                raise RefusedError(
                    f"{name} = {value}: the method {self.method!r} draws whole chunks and knows no probabilities of "
                    "tokens",
                    next="take the method tokens",
                )
        # Whatever the method: tokens of a chunk that a prompt has begun are drawn so.
        DecodeSettings(1, self.temperature, self.top_k, self.top_p)
        if self.method in ("exact", "vote"):
            check_temperature(self.method, self.temperature, self.draws)


@dataclass(frozen=True)
class Request:
    """``prompt`` token ids, none of them the end of a text; at most ``max_new_tokens`` follow; ``seed`` any int64."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    seed: int = 0
    sampling: Sampling = Sampling()


class Keys(NamedTuple):
    """What keys the noise of R rows: ``seeds`` of their requests and the ``positions`` of their chunk in the text, both
    int64 [R]."""

    seeds: Tensor
    positions: Tensor


class Session(Protocol):
    """A batch of texts in the model, each at the place where its next chunk is to be chosen."""

    def draw(self, rows: Tensor, keys: Keys, first: int, count: int, temperature: float) -> Tensor:
        """Draws number ``first`` to ``first + count - 1`` of the next chunk of ``rows`` int64 [R]: int64 [R, count, K].

        Each depends on its row's text and key and on its number alone. Refused at a temperature that the model does not
        know. A place without an answer (logits that are not finite) is -1.
        """
        ...

    def complete(
        self,
        rows: Tensor,
        keys: Keys,
        begun: Tensor,
        lengths: Tensor,
        temperature: Tensor,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        """Next chunks int64 [R, K] of ``rows``, beginning with the first ``lengths`` [R] tokens of ``begun`` [R, K] and
        completed one token after the other at ``temperature`` [R], 0 for the likeliest, from the tokens that ``top_k``
        and then ``top_p`` leave."""
        ...

    def logprobs(self, rows: Tensor, begun: Tensor, place: int) -> Tensor:
        """Log-probabilities fp32 [R, V] of the token at ``place`` of the next chunk of ``rows``, after the tokens that
        ``begun`` int64 [R, K] has before it."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with ``rows`` int64 [R] alone, in this order: row r is from now on what row ``rows[r]`` was."""
        ...

    def advance(self, chunks: Tensor) -> None:
        """Add a chunk int64 [B, K] to each text."""
        ...

    def join(self, other: Session) -> None:
        """Add the texts of another session of the same model after these; the other one is not used again."""
        ...


class ChunkModel(Protocol):
    """A model that writes chunks of ``chunk`` tokens; a text ends with ``eos_id``, ids are below ``vocab_size``."""

    @property
    def chunk(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def tempered(self) -> bool:
        """Whether one draw of its head knows temperatures below 1."""
        ...

    @property
    def greedy(self) -> bool:
        """Whether one draw of its head at temperature 0 is the likeliest chunk."""
        ...

    @property
    def completes(self) -> bool:
        """Whether it knows probabilities of tokens: to complete a chunk that a prompt has begun, and to go on so."""
        ...

    def begin(self, texts: Sequence[Tensor]) -> Session:
        """A session of the beginnings ``texts``, int64 [C, K] each, C of 0 or more and not the same in all."""
        ...


def simplest(model: ChunkModel, sampling: Sampling) -> Sampling:
    """``sampling``, or one draw where that is exact at every temperature: a rejection or a vote is of no use there."""
    if model.greedy and sampling.method in ("exact", "vote"):
        return Sampling("head", sampling.temperature)
    return sampling


def check_request(model: ChunkModel, number: int, request: Request) -> None:
    """RefusedError, by ``number`` and value, where ``model`` cannot serve ``request``."""
    if request.max_new_tokens < 1:
        raise RefusedError(f"request {number}: max_new_tokens = {request.max_new_tokens} is less than 1")
    if not -(2**63) <= request.seed < 2**63:
        raise RefusedError(f"request {number}: seed = {request.seed} is no 64-bit integer")
    for place, token in enumerate(request.prompt):
        if not 0 <= token < model.vocab_size:
            raise RefusedError(f"request {number}: token {token} at place {place} is no id below {model.vocab_size}")
        if token == model.eos_id:
            raise RefusedError(
                f"request {number}: token {token} at place {place} of the prompt is the end of a text",
                next="leave the end-of-text token out of the prompt",
            )
    sampling = request.sampling
    if sampling.method == "head" and sampling.temperature == 0 and not model.greedy:
        raise RefusedError(
            f"request {number}: temperature = {sampling.temperature}: one draw of this head knows temperatures above 0",
            next="vote with temperature 0 for the most frequent chunk",
        )
    if sampling.method == "head" and sampling.temperature != 1 and not model.tempered:
        raise RefusedError(
            f"request {number}: temperature = {sampling.temperature}: one draw of this head knows temperature 1 alone",
            next="take the method exact or vote, or train with tempered samples",
        )
    if sampling.top_k is not None and sampling.top_k > model.vocab_size:
        raise RefusedError(
            f"request {number}: top_k = {sampling.top_k} is more than the {model.vocab_size} tokens",
            next="leave it out",
        )
    if sampling.method == "tokens" and not model.completes:
        raise RefusedError(
            f"request {number}: method = 'tokens': this student has no token head, so no probabilities of tokens",
            next="take the method head, exact or vote, or train with token_layers = 1",
        )
    if len(request.prompt) % model.chunk and not model.completes:
        raise RefusedError(
            f"request {number}: a prompt of {len(request.prompt)} tokens begins a chunk of {model.chunk}, and this "
            "student has no token head to complete it",
            next=f"give a prompt of a multiple of {model.chunk} tokens, or train with token_layers = 1",
        )
