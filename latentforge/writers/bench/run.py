"""One bench from end to end: who takes part, the prompts in tokens, the turns, the verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from os import getloadavg

import torch

from latentforge.errors import RefusedError
from latentforge.kernels.bench.machine import this_machine
from latentforge.kernels.bench.run import code_identity
from latentforge.spec.bench import BenchSpec
from latentforge.spec.canonical import canonical_sha256
from latentforge.students.latent.requests import ChunkModel, Sampling
from latentforge.writers.bench.contestants import Engine, TransformersGenerate
from latentforge.writers.bench.cost import flops_per_token
from latentforge.writers.bench.gates import Seen, judge
from latentforge.writers.bench.hits import Hits
from latentforge.writers.bench.memory import Meter, Peak
from latentforge.writers.bench.quality import Quality
from latentforge.writers.bench.report import Entrant, Report, here
from latentforge.writers.bench.turns import Asked, Contestant, Tell, measure
from latentforge.writers.opening import Writer


@dataclass(frozen=True)
class Work:
    """What is measured: the ``student`` that the gates judge and those ``beside`` it, each by the name under which it
    is reported. A prompt is a text, or token ids. ``quality`` is by the sha256 of a student's weights.
    With ``own_peaks`` the process's peak of memory is counted anew for each turn.
    """

    student: tuple[str, Writer]
    beside: tuple[tuple[str, Writer], ...]
    prompts: tuple[str | tuple[int, ...], ...]
    seed: int
    hits: Hits | None
    quality: dict[str, Quality]
    own_peaks: bool = True


@dataclass(frozen=True)
class _Entered:
    """A contestant, with the writer that it writes with."""

    contestant: Contestant
    role: str
    named: str
    writer: Writer


def run(work: Work, asked: BenchSpec, *, tell: Tell = lambda line, done, total: None) -> Report:
    """Measure and judge; RefusedError before anything is measured where a contestant cannot take part."""
    entered = _enter(work, asked)
    if work.quality and not any(one.writer.digests["student"] in work.quality for one in entered):
        raise RefusedError(
            "--quality FILE is of other students: none of its weights' digests is one of those that are measured here",
            next=f"latentforge bench quality {work.student[0]} --data RUN --out FILE",
        )
    device = entered[0].writer.model.device
    turns = Asked(
        _tokens(work.prompts, entered[0].writer),
        asked.max_tokens,
        Sampling(asked.method, asked.temperature, asked.draws, asked.top_k, asked.top_p),
        asked.batch,
        asked.repeats,
        work.seed,
    )
    started, load, meter = datetime.now(UTC), getloadavg()[0], Meter(device, anew=work.own_peaks)
    measured = measure([one.contestant for one in entered], turns, meter, tell=tell)
    peaks = Peak.largest([one.peak for one in measured])
    peak = peaks._replace(process=max(peaks.process, meter.process))
    entrants = [
        Entrant(
            found,
            one.role,
            one.named,
            one.writer.digests,
            one.writer.parameters,
            one.writer.model.chunk,
            flops_per_token(one.writer.model, turns, found.turns[0].texts),
            work.quality.get(one.writer.digests["student"]),
        )
        for one, found in zip(entered, measured, strict=True)
    ]
    return Report(
        here=here(this_machine(device), torch.get_num_threads(), load, started, code_identity()),
        asked=turns,
        prompts_sha256=canonical_sha256(turns.prompts),
        tokenizer_sha256=entered[0].writer.tokenizer.sha256,
        entrants=entrants,
        peak=peak,
        hits=work.hits,
        gates=asked.gates,
        verdicts=judge(asked, Seen.of(measured[0], peak, work.hits)),
    )


def _enter(work: Work, asked: BenchSpec) -> list[_Entered]:
    names = _Names()
    entered: list[_Entered] = []
    for named, writer in (work.student, *work.beside):
        if entered and writer.tokenizer.sha256 != entered[0].writer.tokenizer.sha256:
            raise RefusedError(
                f"{named} writes in tokens of another tokenizer than {work.student[0]}: tokens/s of the two cannot be "
                "compared",
                next="take students of one data run",
            )
        name = names.next(_called(writer.model, writer.kind))
        entered.append(_Entered(Engine(name, writer.model), writer.kind, named, writer))
    if not asked.transformers:
        return entered
    token_level = [one for one in entered if one.role == "token"]
    if not token_level:
        raise RefusedError(
            "transformers writes token after token, and no token-level student is named",
            next="--beside RUN, a distill run of the same data",
        )
    for one in token_level:
        theirs = TransformersGenerate(
            names.next("transformers"), one.writer.folder, one.writer.tokenizer.eos_id, one.writer.model.device
        )
        entered.append(_Entered(theirs, "transformers", one.named, one.writer))
    return entered


def _called(model: ChunkModel, kind: str) -> str:
    return f"latent, K = {model.chunk}" if kind == "latent" else "token-level"


class _Names:
    """Each name once: the second of a kind is numbered."""

    def __init__(self) -> None:
        self._given: dict[str, int] = {}

    def next(self, name: str) -> str:
        self._given[name] = count = self._given.get(name, 0) + 1
        return name if count == 1 else f"{name} ({count})"


def _tokens(prompts: Sequence[str | tuple[int, ...]], writer: Writer) -> tuple[tuple[int, ...], ...]:
    return tuple(writer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts)
