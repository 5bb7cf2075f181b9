"""Contestants write the same prompts in turns, so that a busy minute of the machine falls on all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from latentforge.students.latent.requests import Sampling
from latentforge.writers.bench.memory import Meter, Peak

Clock = Callable[[], float]
"""Seconds, from wherever they are counted."""


Tell = Callable[[str, int, int], None]
"""Hears who is at work, and how many turns of how many are over."""


@dataclass(frozen=True)
class Asked:
    """What each contestant does in a turn: ``max_tokens`` after each prompt (token ids), ``batch`` prompts at a time.

    Prompt number n is written with the seed ``seed + n`` in each of ``repeats`` rounds, so that all rounds are the same
    work.
    """

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    sampling: Sampling
    batch: int = 1
    repeats: int = 3
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of a turn where no text ends early."""
        return len(self.prompts) * self.max_tokens

    def batches(self) -> list[range]:
        """The numbers of the prompts that are written together."""
        count = len(self.prompts)
        return [range(first, min(first + self.batch, count)) for first in range(0, count, self.batch)]


class Text(NamedTuple):
    """A text as it was written: the ``tokens`` that came after its prompt, an EOS included where it ended so.

    ``arrivals`` are seconds since its batch was handed over, one for each step that gave it tokens; ``drawn`` steps of
    them were drawn, by ``draws`` draws in all.
    """

    tokens: tuple[int, ...]
    arrivals: tuple[float, ...]
    draws: int
    drawn: int


class Turn(NamedTuple):
    """All texts of one turn, the ``seconds`` that it took from end to end, and the memory's peak in it."""

    texts: list[Text]
    seconds: float
    peak: Peak

    @property
    def produced(self) -> int:
        """Tokens that were written, not those that were asked for."""
        return sum(len(text.tokens) for text in self.texts)

    @property
    def steps(self) -> int:
        """Steps that gave a text tokens: chunks of a latent student, tokens of a token-level one."""
        return sum(len(text.arrivals) for text in self.texts)

    @property
    def to_first(self) -> list[float]:
        """Seconds to the first chunk, of each text; reading the prompt is a part of them."""
        return [text.arrivals[0] for text in self.texts]

    @property
    def between(self) -> list[float]:
        """Seconds from a text's chunk to its next one."""
        return [b - a for text in self.texts for a, b in zip(text.arrivals, text.arrivals[1:], strict=False)]


class Contestant(Protocol):
    """Somebody who writes: ``name`` is unique among those measured together."""

    @property
    def name(self) -> str: ...

    def write(self, asked: Asked, clock: Clock) -> list[Text]:
        """The texts of all prompts, in their order."""
        ...


@dataclass
class Measured:
    """What one contestant did in all rounds; the first turn, in which caches are filled, is not among them."""

    name: str
    turns: list[Turn] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> list[float]:
        """Produced tokens by seconds, of each round."""
        return [turn.produced / turn.seconds for turn in self.turns]

    @property
    def steps_per_second(self) -> list[float]:
        """Steps by seconds, of each round."""
        return [turn.steps / turn.seconds for turn in self.turns]

    @property
    def to_first(self) -> list[float]:
        """Seconds to the first chunk, of each text of each round."""
        return [seconds for turn in self.turns for seconds in turn.to_first]

    @property
    def between(self) -> list[float]:
        """Seconds from a text's chunk to its next one, of all rounds."""
        return [seconds for turn in self.turns for seconds in turn.between]

    @property
    def peak(self) -> Peak:
        """The largest of the rounds."""
        return Peak.largest([turn.peak for turn in self.turns])


def measure(
    contestants: Sequence[Contestant],
    asked: Asked,
    meter: Meter,
    *,
    clock: Clock = time.perf_counter,
    tell: Tell = lambda line, done, total: None,
) -> list[Measured]:
    """A turn of everybody that is not counted, then ``asked.repeats`` rounds, each second one in the opposite order.

    An error of a contestant ends it all: texts that nobody wrote have no speed.
    """
    found = [Measured(one.name) for one in contestants]
    done, total = 0, len(contestants) * (1 + asked.repeats)
    for one in contestants:
        tell(f"{one.name}: first turn", done, total)
        _turn(one, asked, meter, clock)
        done += 1
    pairs = list(zip(contestants, found, strict=True))
    for number in range(asked.repeats):
        for one, kept in pairs if number % 2 == 0 else pairs[::-1]:
            tell(f"{one.name}: round {number + 1} of {asked.repeats}", done, total)
            kept.turns.append(_turn(one, asked, meter, clock))
            done += 1
    return found


def _turn(contestant: Contestant, asked: Asked, meter: Meter, clock: Clock) -> Turn:
    meter.begin()
    start = clock()
    texts = contestant.write(asked, clock)
    seconds = clock() - start
    return Turn(texts, seconds, meter.end())


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest of ``values`` that at least ``share`` of them do not exceed; None of no values."""
    if not values:
        return None
    return sorted(values)[max(1, math.ceil(share * len(values))) - 1]


def ratios(ours: Measured, other: Measured) -> list[float]:
    """How many times the tokens a second of ``other`` ours are, in each round."""
    return [a / b for a, b in zip(ours.tokens_per_second, other.tokens_per_second, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}
