"""Executable checks of what the bench's gates claim; the contract ``bench`` names these functions and plants faults.

What is measured there is scripted: a writer whose steps take known times, by a clock that moves with them.
"""

from __future__ import annotations

import mmap
import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from latentforge.contracts.finding import Finding
from latentforge.spec.bench import BenchSpec
from latentforge.students.latent.requests import Keys, Sampling
from latentforge.verdicts import Outcome
from latentforge.writers.bench.contestants import Engine
from latentforge.writers.bench.gates import Seen, judge
from latentforge.writers.bench.hits import Hits
from latentforge.writers.bench.memory import Meter, Peak
from latentforge.writers.bench.turns import Asked, Measured, measure

EOS, CHUNK = 0, 4
READING, STEP, SLOW = 0.5, 0.01, 0.2
STEPS = 10  # of which the second last is slow; the last one's third token is an EOS
PRODUCED = CHUNK * (STEPS - 1) + 3
SECONDS = READING + STEP * (STEPS - 1) + SLOW


class ScriptedModel:
    """A ``ChunkModel`` that writes 39 tokens after any prompt, in ten steps whose seconds it puts on its own clock."""

    chunk, eos_id, vocab_size, tempered, completes, greedy = CHUNK, EOS, 9, True, False, False

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        """Seconds that the script has taken."""
        return self.now

    def begin(self, texts: Sequence[Tensor]) -> ScriptedSession:
        """Reads the prompts, all at once."""
        self.now += READING
        return ScriptedSession(self, len(texts))


class ScriptedSession:
    """Texts of the script, all at the same step."""

    def __init__(self, model: ScriptedModel, texts: int) -> None:
        self._model, self._texts, self._step = model, texts, 0

    def draw(self, rows: Tensor, keys: Keys, first: int, count: int, temperature: float) -> Tensor:
        """The step's chunk for each row and draw."""
        self._step += 1
        self._model.now += SLOW if self._step == STEPS - 1 else STEP
        chunk = [1, 2, EOS, EOS] if self._step == STEPS else [1, 2, 3, 4]
        return torch.tensor(chunk).expand(len(rows), count, CHUNK)

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
        """Not there: the script's prompts are of whole chunks."""
        raise NotImplementedError

    def logprobs(self, rows: Tensor, begun: Tensor, place: int) -> Tensor:
        """Not there: the script has no probabilities."""
        raise NotImplementedError

    def keep(self, rows: Tensor) -> None:
        """All are alike."""
        self._texts = len(rows)

    def advance(self, chunks: Tensor) -> None:
        """The script knows where it is."""

    def join(self, other: ScriptedSession) -> None:
        """All are alike."""
        self._texts += other._texts


def scripted(max_tokens: int = 64, texts: int = 3) -> tuple[Asked, Measured]:
    """What the bench measures of the script."""
    model = ScriptedModel()
    asked = Asked(((1, 2, 3, 4),) * texts, max_tokens, Sampling(), repeats=2)
    (found,) = measure([Engine("scripted", model)], asked, Meter(torch.device("cpu")), clock=model.clock)
    return asked, found


def speed_counts_what_was_produced(*, mutant: str | None = None) -> Finding:
    """A gate just below 39 tokens in their seconds passes, one just above fails. ``mutant`` "asked" counts 64."""
    asked, found = scripted()
    seen = _seen(found)
    if mutant == "asked":
        seen = replace(seen, tokens_per_second=[asked.tokens / turn.seconds for turn in found.turns])
    true = PRODUCED / SECONDS
    outcomes = [_outcome(seen, min_tokens_per_second=gate) for gate in (0.99 * true, 1.01 * true, 1e12)]
    wanted = [Outcome.PASS, Outcome.FAIL, Outcome.FAIL]
    speed = statistics.median(seen.tokens_per_second)
    return _found(outcomes, wanted, f"{speed:.1f} tokens/s of a script that produces {true:.1f}")


def latency_is_the_slow_ones(*, mutant: str | None = None) -> Finding:
    """One chunk in nine is twenty times slower, which a gate on p95 sees. ``mutant`` "mean" takes the mean."""
    _, found = scripted()
    seen = _seen(found)
    if mutant == "mean":
        seen = replace(seen, between=[statistics.fmean(seen.between)])
    gates = (
        {"max_p95_chunk_s": 1.01 * SLOW},
        {"max_p95_chunk_s": 0.5 * SLOW},
        {"max_p95_first_chunk_s": 1.01 * (READING + STEP)},
        {"max_p95_first_chunk_s": 0.99 * (READING + STEP)},
        {"max_p95_chunk_s": 1e-12},
    )
    wanted = [Outcome.PASS, Outcome.FAIL, Outcome.PASS, Outcome.FAIL, Outcome.FAIL]
    outcomes = [_outcome(seen, **gate) for gate in gates]
    return _found(outcomes, wanted, f"gates on p95 of chunks that take {STEP} s, and {SLOW} s one time in nine")


def memory_is_the_peak(*, mutant: str | None = None) -> Finding:
    """What a turn takes and gives back counts. ``mutant`` "after" looks when it is given back."""
    size, meter = 200_000_000, Meter(torch.device("cpu"))
    meter.begin()
    before = meter.end()
    meter.begin()
    with mmap.mmap(-1, size) as taken:
        torch.frombuffer(taken, dtype=torch.uint8).fill_(1)
    if mutant == "after":
        meter.begin()
    peak = meter.end()
    if not peak.own:
        return Finding(None, "this system cannot count a process's peak anew: that of a turn is not known")
    grown = (peak.total - before.total) / 1e9
    seen = replace(_seen(scripted()[1]), peak=peak)
    outcomes = [_outcome(seen, max_peak_memory_gb=before.total / 1e9 + share * size / 1e9) for share in (0.5, 2.0)]
    outcomes.append(_outcome(seen, max_peak_memory_gb=1e-9))
    text = f"peak grows by {grown:.2f} GB where {size / 1e9:.2f} GB are taken and given back"
    return _found(outcomes, [Outcome.FAIL, Outcome.PASS, Outcome.FAIL], text)


def cache_must_be_known(*, mutant: str | None = None) -> Finding:
    """A rate below the gate fails, one that nobody knows does not pass. ``mutant`` "assumed" takes it for 1."""
    seen = _seen(scripted()[1])
    rates: list[Hits | None] = [Hits(0.85, "latent-0"), Hits(0.75, "latent-0"), None]
    if mutant == "assumed":
        rates = [one or Hits(1.0, "latent-0") for one in rates]
    outcomes = [_outcome(replace(seen, hits=hits), min_hit_rate=0.8) for hits in rates]
    return _found(outcomes, [Outcome.PASS, Outcome.FAIL, Outcome.UNKNOWN], "hit rates 85 %, 75 % and not known at 80 %")


def _seen(found: Measured) -> Seen:
    return Seen.of(found, Peak(1, None, True), None)


def _outcome(seen: Seen, **gates: float) -> Outcome:
    (verdict,) = judge(BenchSpec(**gates), seen)
    return verdict.outcome


def _found(outcomes: list[Outcome], wanted: list[Outcome], text: str) -> Finding:
    names = [one.name for one in outcomes]
    return Finding(outcomes == wanted, f"{text}: {', '.join(names)}", {"outcomes": names})
