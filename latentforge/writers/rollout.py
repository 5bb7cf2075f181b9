"""What a model writes, as its teacher reads it: the likelihood of each chunk by its place, beside that of real text.

Training shows true text alone, so what a model makes of its own chunks is not in its loss: where it leaves what the
teacher could have said, the teacher's surprise grows with the place. Text that repeats itself surprises less and less;
so the measure is the distance from the teacher's own texts, and not how low it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.students.latent.generate import generate
from latentforge.students.latent.requests import ChunkModel, Request, Sampling
from latentforge.students.likelihood import row_logprobs
from latentforge.students.token_session import TokenModel

Texts = tuple[tuple[int, ...], ...]
_TOGETHER = 32  # texts that are read at once


class Place(NamedTuple):
    """What a teacher says of chunk number ``chunk`` (from 0) after the prompts: ``bits`` a token over the tokens of
    ``texts`` texts that went so far, with the standard ``error`` of their mean (None of a single one)."""

    chunk: int
    bits: float
    error: float | None
    texts: int


@dataclass(frozen=True)
class Written:
    """Texts after prompts: ``prompts`` and ``texts`` token ids, those of a text ending with an EOS where it ended;
    ``draws`` of the head for each chunk, on average, 0 where tokens were drawn one by one."""

    prompts: Texts
    texts: Texts
    draws: float


def write(model: ChunkModel, prompts: Texts, *, new_tokens: int, seed: int, sampling: Sampling) -> Written:
    """At most ``new_tokens`` after each prompt, text n with seed ``seed`` + n."""
    asked = [Request(prompt, new_tokens, seed + number, sampling) for number, prompt in enumerate(prompts)]
    found = generate(model, asked)
    drawn = sum(one.steps for one in found)
    draws = sum(one.draws for one in found) / drawn if drawn else 1.0
    return Written(prompts, tuple(one.tokens for one in found), draws)


def write_in_window(model: TokenModel, prompts: Texts, *, new_tokens: int, seed: int, window: int) -> Written:
    """The same of a model that knows ``window`` positions: what is further back than half of them is forgotten when the
    window is full."""
    if window < 4:
        raise RefusedError(f"window = {window}: a model of fewer than 4 positions writes no text to compare with")
    texts: list[tuple[int, ...]] = [() for _ in prompts]
    going, made, keep = list(range(len(prompts))), 0, window // 2
    while going and made < new_tokens:
        count = min(window - 1 - keep, new_tokens - made)  # an EOS stands before each text
        asked = [Request((prompts[row] + texts[row])[-keep:], count, seed + made * len(prompts) + row) for row in going]
        found = generate(model, asked)
        for row, one in zip(going, found, strict=True):
            texts[row] += one.tokens
        going = [row for row, one in zip(going, found, strict=True) if one.finish != "eos"]
        made += count
    return Written(prompts, tuple(texts), 1.0)


def places(teacher: TokenModel, window: int, written: Written, *, chunk: int) -> tuple[Place, ...]:
    """The teacher's bits a token of each chunk of ``chunk`` tokens after the prompts, which it reads after an EOS; by
    windows of the ``window`` positions that it knows where a text is longer."""
    found = []
    for start in range(0, len(written.texts), _TOGETHER):
        some = slice(start, start + _TOGETHER)
        found += _surprises(teacher, written.prompts[some], written.texts[some], window)
    by_place: dict[int, list[tuple[float, int]]] = {}
    for surprise in found:
        for number, part in enumerate(surprise.split(chunk)):
            by_place.setdefault(number, []).append((float(part.sum()), len(part)))
    return tuple(_place(number, parts) for number, parts in sorted(by_place.items()))


def binned(found: Sequence[Place]) -> list[Place]:
    """Places joined as 0, 1, 2 to 3, 4 to 7 and so on; ``chunk`` is the first of each, ``texts`` those that reached it.
    Errors are those of neighbours taken as independent."""
    joined = []
    start = 0
    while start < len(found):
        some = found[start : max(1, 2 * start)] if start else found[:1]
        weight = sum(one.texts for one in some)
        bits = sum(one.bits * one.texts for one in some) / weight
        errors = [one.error for one in some if one.error is not None]
        error = math.sqrt(sum(e * e for e in errors)) / len(errors) if errors else None
        joined.append(Place(some[0].chunk, bits, error, some[0].texts))
        start += len(some)
    return joined


def as_json(found: Sequence[Place]) -> list[dict[str, Any]]:
    """The places as data."""
    return [one._asdict() for one in found]


@torch.no_grad()
def _surprises(teacher: TokenModel, prompts: Texts, texts: Texts, window: int) -> list[Tensor]:
    """Bits of each token of each text, fp32 [n], after its prompt."""
    whole = [(teacher.eos_id, *prompt, *text) for prompt, text in zip(prompts, texts, strict=True)]
    tokens = torch.full((len(whole), max(map(len, whole))), teacher.eos_id)
    for row, text in enumerate(whole):
        tokens[row, : len(text)] = torch.tensor(text)
    said = -row_logprobs(teacher.student, tokens.to(teacher.device), window=window).cpu() / math.log(2)
    return [said[row, len(prompt) : len(whole[row]) - 1] for row, prompt in enumerate(prompts)]


def _place(number: int, parts: list[tuple[float, int]]) -> Place:
    bits = torch.tensor([one[0] for one in parts], dtype=torch.float64)
    count = torch.tensor([one[1] for one in parts], dtype=torch.float64)
    mean = float(bits.sum() / count.sum())
    spread = (bits - mean * count) / count.mean()
    error = float(spread.std() / len(parts) ** 0.5) if len(parts) > 1 else None
    return Place(number, mean, error, len(parts))
