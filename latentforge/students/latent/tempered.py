"""Low temperatures for a model that can only be drawn from: P^(1/T) by exact rejection, or by a vote of many draws.

A latent student has no probabilities to sharpen. Both ways are those of CALM (arXiv 2510.27688): ``exact`` has the
distribution P^(1/T) / sum P^(1/T) for every T in (0, 1] and needs more draws the flatter P is; ``vote`` spends a fixed
number of draws, knows T = 1/n and T = 0 alone, and approaches the distribution as that number grows.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Generator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from latentforge.errors import FailedError, RefusedError

Chunk = tuple[int, ...]
_WHOLE = 1e-9  # 1/T is a whole number where it is one but for the rounding of T


class Draw(Protocol):
    """A model at the contexts of a batch, as something to draw from."""

    def __call__(self, rows: Tensor, first: int, count: int) -> Tensor:
        """Draws number ``first`` to ``first + count - 1`` of the contexts ``rows`` int64 [R]: int64 [R, count, K].

        A context's draw of a number is the same whenever it is asked for and beside whichever rows.
        """
        ...


class Drawn(NamedTuple):
    """``chunks`` int64 [R, K], -1 where ``settled`` bool [R] is false because the bound on draws was reached.

    ``used`` int64 [R] draws decided a row, ``made`` int64 [R] were computed for it: they are asked for several at once.
    """

    chunks: Tensor
    settled: Tensor
    used: Tensor
    made: Tensor

    def checked(self, temperature: float) -> Drawn:
        """This, or FailedError where a row has no chunk; it names the temperature and the draws made."""
        if bool(self.settled.all()):
            return self
        row = int((~self.settled).nonzero()[0, 0])
        raise FailedError(
            f"temperature = {temperature}: none of {int(self.made[row])} draws of context {row} was accepted; "
            "no chunk is likely enough to come up again",
            next="allow more draws, take a higher temperature, or vote at T = 1/n, which needs a fixed number of draws",
        )


def check_temperature(method: str, temperature: float, draws: int) -> None:
    """RefusedError where ``exact`` with at most ``draws`` draws, or a ``vote`` of as many, has no such temperature."""
    if method == "vote":
        _times(temperature, draws)
    elif draws < _power(temperature)[0]:
        raise RefusedError(
            f"draws = {draws}: temperature {temperature} needs {_power(temperature)[0]} equal draws for a chunk",
            next="allow more draws",
        )


def expected_draws(probabilities: Tensor, temperature: float) -> float:
    """Draws that ``exact`` uses on average for one chunk of a known distribution, fp [M] summing to 1.

    (n + [a > 0] sum P^(1/T - 1)) / sum P^(1/T), with n = floor(1/T) and a = 1/T - n.
    """
    whole, part = _power(temperature)
    p = probabilities[probabilities > 0].double()
    second = float((p ** (whole + part - 1)).sum()) if part else 0.0
    return (whole + second) / float((p ** (whole + part)).sum())


def exact(
    draw: Draw, *, temperature: float, seeds: Tensor, positions: Tensor, limit: int = 10_000, at_once: int = 8
) -> Drawn:
    """One chunk of each context from P^(1/T), ``temperature`` T in (0, 1], in at most ``limit`` draws a context.

    Row r's answer depends on its draws and on ``seeds`` and ``positions`` int64 [R] alone, not on the other rows nor on
    ``at_once``, the draws asked for together. Stage 1 draws n = floor(1/T) chunks and begins anew unless all are equal.
    Stage 2 accepts the common chunk with probability P^(1/T - n), without knowing P: it draws until the chunk comes
    again, and after the i-th draw that is another gives up with probability (1/T - n) / i.
    A row without a chunk after ``limit`` draws is not settled: see ``Drawn.checked``.
    """
    whole, part = _power(temperature)
    check_temperature("exact", temperature, limit)
    if at_once < 1:
        raise RefusedError(f"at_once = {at_once}: at least 1 draw is made at a time")
    rules = [_rejection(whole, part, chance) for chance in _chances(seeds, positions)]
    for rule in rules:
        next(rule)
    accepted: dict[int, Chunk] = {}
    used = [0] * len(rules)
    made = [0] * len(rules)
    first, width = 0, 1
    while first < limit and len(accepted) < len(rules):
        count = min(at_once, limit - first)
        open_rows = [row for row in range(len(rules)) if row not in accepted]
        drawn = draw(torch.tensor(open_rows, dtype=torch.int64), first, count)
        width = drawn.shape[-1]
        for row, chunks in zip(open_rows, _chunks(drawn), strict=True):
            made[row] += count
            found, taken = _feed(rules[row], chunks)
            used[row] += taken
            if found is not None:
                accepted[row] = found
        first += count
    return _answer([accepted.get(row) for row in range(len(rules))], width, used, made)


def vote(
    draw: Draw, *, temperature: float, draws: int, seeds: Tensor, positions: Tensor, at_once: int | None = None
) -> Drawn:
    """One chunk of each context from ``draws`` draws, at ``temperature`` 1/n or, as its limit, 0: the most frequent.

    Of the chunks that came at least m times, m = n or the largest below it for which there are any, one is taken with
    weight C(times, m). At temperature 0 that is one of the most frequent, each with equal chance. Biased for few draws;
    tends to P^n as they grow. Row r depends on its draws and on ``seeds`` and ``positions`` int64 [R] alone.
    """
    times = _times(temperature, draws)
    chances = _chances(seeds, positions)
    rows = torch.arange(len(chances))
    step = draws if at_once is None else at_once
    if step < 1:
        raise RefusedError(f"at_once = {at_once}: at least 1 draw is made at a time")
    parts = [draw(rows, first, min(step, draws - first)) for first in range(0, draws, step)]
    drawn = torch.cat(parts, dim=1)
    chosen = [_elect(Counter(chunks), times, chance) for chunks, chance in zip(_chunks(drawn), chances, strict=True)]
    return _answer(chosen, drawn.shape[-1], [draws] * len(chances), [draws] * len(chances))


def _power(temperature: float) -> tuple[int, float]:
    """1/T as (n, a): its whole part and what is left, 0 where 1/T is whole but for rounding."""
    if not 0 < temperature <= 1:
        raise RefusedError(
            f"temperature = {temperature}: rejection knows temperatures above 0 and up to 1",
            next="vote with temperature 0 for the most frequent chunk",
        )
    power = 1 / temperature
    nearest = round(power)
    if abs(power - nearest) <= _WHOLE * power:
        return nearest, 0.0
    return math.floor(power), power - math.floor(power)


def _times(temperature: float, draws: int) -> int:
    if draws < 1:
        raise RefusedError(f"draws = {draws}: a vote needs at least 1")
    if temperature == 0:
        return draws
    whole, part = _power(temperature)
    if part:
        raise RefusedError(
            f"temperature = {temperature}: a vote knows 0, 1, 1/2, 1/3 and so on",
            next=f"take {1 / (whole + 1)!r} or {1 / whole!r}, or exact rejection, which knows every temperature",
        )
    if draws < whole:
        raise RefusedError(
            f"draws = {draws}: at temperature {temperature} a chunk must come {whole} times", next="vote of more draws"
        )
    return whole


def _rejection(whole: int, part: float, chance: random.Random) -> Generator[None, Chunk, Chunk]:
    """The rule of ``exact`` for one context: is sent draws, returns the accepted one."""
    while True:
        candidate = yield
        others = []
        for _ in range(whole - 1):
            others.append((yield))
        if any(other != candidate for other in others):
            continue
        if not part:
            return candidate
        failures = 1
        while (yield) != candidate:
            if chance.random() < part / failures:
                break
            failures += 1
        else:
            return candidate


def _feed(rule: Generator[None, Chunk, Chunk], chunks: list[Chunk]) -> tuple[Chunk | None, int]:
    """The chunk that the rule accepts among these, if any, and how many it looked at."""
    for taken, chunk in enumerate(chunks, start=1):
        try:
            rule.send(chunk)
        except StopIteration as accepted:
            return accepted.value, taken
    return None, len(chunks)


def _elect(counts: Counter[Chunk], times: int, chance: random.Random) -> Chunk:
    """One of the counted, with weight C(count, m) for the largest m <= times that any of them reaches."""
    reached = min(times, max(counts.values()))
    weights = [(one, math.comb(count, reached)) for one, count in sorted(counts.items()) if count >= reached]
    # Whole numbers throughout: the weights can be larger than any float.
    mark = chance.getrandbits(64) * sum(weight for _, weight in weights) >> 64
    for one, weight in weights:
        mark -= weight
        if mark < 0:
            return one
    raise AssertionError("the mark lies below the sum of the weights")


def _chances(seeds: Tensor, positions: Tensor) -> list[random.Random]:
    """A generator for each context, keyed by its integers as text: no state is shared, none depends on the batch."""
    if (
        seeds.dtype != torch.int64
        or positions.dtype != torch.int64
        or seeds.ndim != 1
        or seeds.shape != positions.shape
    ):
        raise RefusedError(
            f"seeds {seeds.dtype} {list(seeds.shape)} and positions {positions.dtype} {list(positions.shape)}; "
            "both must be int64 [R], one for each context"
        )
    pairs = zip(seeds.tolist(), positions.tolist(), strict=True)
    return [random.Random(f"{seed}/{position}") for seed, position in pairs]


def _chunks(drawn: Tensor) -> list[list[Chunk]]:
    return [[tuple(chunk) for chunk in row] for row in drawn.tolist()]


def _answer(chunks: Sequence[Chunk | None], width: int, used: list[int], made: list[int]) -> Drawn:
    missing = (-1,) * width
    return Drawn(
        torch.tensor([missing if chunk is None else chunk for chunk in chunks], dtype=torch.int64),
        torch.tensor([chunk is not None for chunk in chunks], dtype=torch.bool),
        torch.tensor(used, dtype=torch.int64),
        torch.tensor(made, dtype=torch.int64),
    )
