"""How likely a text is to the student that may have written it, token by token, and the best of several by that."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from latentforge.errors import RefusedError
from latentforge.students.latent.generate import Generated, generate
from latentforge.students.latent.requests import ChunkModel, Request

_BLOCK = 1 << 24
"""Logits in memory at once."""


class Scorer(ChunkModel, Protocol):
    """A model that knows probabilities of tokens, if it ``completes``."""

    def score(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """Natural log-probabilities fp32 [n] of each token of ``texts``, int64 [n] each, given those before it in its
        text; at temperature 1, over the whole vocabulary. Nothing may follow an end of text. RefusedError where there
        is no token head."""
        ...


class Scored(NamedTuple):
    """A text and the log-probability, in nats, of each of its new tokens."""

    generated: Generated
    logprobs: tuple[float, ...]

    @property
    def score(self) -> float:
        """The mean log-probability of a token."""
        return sum(self.logprobs) / len(self.logprobs)


class Best(NamedTuple):
    """The text of the highest score among ``scores``, those of all candidates; the first of equals. ``draws`` are
    those of all."""

    chosen: Scored
    scores: tuple[float, ...]
    draws: int


def scored(model: Scorer, found: Sequence[Generated]) -> list[Scored]:
    """Each text with the log-probabilities of what follows its prompt."""
    rows = model.score([torch.tensor(one.prompt + one.tokens) for one in found])
    pairs = zip(found, rows, strict=True)
    return [Scored(one, tuple(row[len(one.prompt) :].tolist())) for one, row in pairs]


def best_of(model: Scorer, requests: Sequence[Request], count: int) -> list[Best]:
    """Of ``count`` texts of each request, the one with the highest mean log-probability of a token.

    The first candidate is the request's own text and the others are drawn with seeds that follow from its own, so the
    best is never worse than a single text, and does not depend on the other requests.
    """
    if count < 1:
        raise RefusedError(f"best of {count}: at least 1 text is written")
    for number, request in enumerate(requests):
        if count > 1 and request.sampling.temperature == 0 and request.sampling.method in ("head", "tokens"):
            raise RefusedError(
                f"request {number}: best of {count} at temperature 0: all of them would be the same text",
                next="take a temperature above 0",
            )
    candidates = [replace(one, seed=seed_of(one.seed, n)) for one in requests for n in range(count)]
    every = scored(model, generate(model, candidates))
    groups = [every[at : at + count] for at in range(0, len(every), count)]
    return [
        Best(
            max(group, key=lambda one: one.score),
            tuple(one.score for one in group),
            sum(one.generated.draws for one in group),
        )
        for group in groups
    ]


def seed_of(seed: int, candidate: int) -> int:
    """The seed of a candidate of a request: the request's own of number 0."""
    if candidate == 0:
        return seed
    key = hashlib.sha256(f"candidate {seed} {candidate}".encode()).digest()
    return int.from_bytes(key[:8], "big", signed=True)


def check_texts(model: ChunkModel, texts: Sequence[Tensor]) -> None:
    """RefusedError, by number and value, where a text cannot be scored by ``model``."""
    if not model.completes:
        raise RefusedError(
            "this student has no token head: there are no probabilities of tokens",
            next="train with token_layers = 1",
        )
    for number, text in enumerate(texts):
        wrong = ((text < 0) | (text >= model.vocab_size)).nonzero()
        if len(wrong):
            place = int(wrong[0])
            raise RefusedError(f"text {number}: token {int(text[place])} at place {place} is no id")
        if bool((text[:-1] == model.eos_id).any()):
            raise RefusedError(f"text {number}: tokens follow the end of the text")


def token_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """Log-probabilities fp32 [N] of the tokens ``ids`` int64 [N] by the states ``hidden`` [N, d] before them, over the
    rows of ``weight`` [V, d]; the logits of a block of rows at a time are in memory."""
    rows = max(1, _BLOCK // len(weight))
    found = [
        F.linear(some, weight, bias).float().log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
        for some, wanted in zip(hidden.split(rows), ids.split(rows), strict=True)
    ]
    return torch.cat(found)
