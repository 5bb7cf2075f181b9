"""The planned peak of a training beside the one that its process really had, each case in a process of its own.

``latentforge bench memory`` prints the table of docs/memory.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, Self

from latentforge.errors import FailedError
from latentforge.memory.measured import FAR_SHARE
from latentforge.memory.shape import ModelShape
from latentforge.memory.training import Step, adapter_parameters, training_terms
from latentforge.spec.lora import LoraSpec

Precision = Literal["fp32", "bf16"]
_STEPS = 3
"""The second has moments beside all else; a third to be sure."""


@dataclass(frozen=True)
class Case:
    """A student of some size, and how it is trained: ``passes`` of ``rows`` rows a step, adapters of ``rank``."""

    hidden: int = 512
    layers: int = 8
    vocabulary: int = 8192
    rows: int = 4
    length: int = 257
    passes: int = 1
    precision: Precision = "fp32"
    recomputed: bool = False
    rank: int = 0

    @property
    def shape(self) -> ModelShape:
        """The student's size: heads of 64, a gated MLP three times as wide."""
        heads = self.hidden // 64
        sizes = {"heads": heads, "kv_heads": max(1, heads // 2), "intermediate": 3 * self.hidden}
        return ModelShape.qwen3(self.vocabulary, layers=self.layers, hidden=self.hidden, **sizes)

    @property
    def planned(self) -> int:
        """Bytes that its training is planned to hold, without the runtime, a checkpoint or what a run holds beside."""
        adapters = adapter_parameters(self.shape, LoraSpec(rank=self.rank)) if self.rank else None
        step = Step(self.rows, self.length - 1, self.precision, self.passes > 1, self.recomputed, adapters)
        terms = training_terms(self.shape, step, who="student", device="cpu")
        return sum(term.bytes for term in terms if term.name != "checkpoint")

    @property
    def name(self) -> str:
        """As a row of the table says it."""
        parts = [self.precision if self.precision == "fp32" else "bf16, fp32 masters"]
        parts += ["activations again"] * self.recomputed + [f"LoRA {self.rank}"] * (self.rank > 0)
        return ", ".join(parts + [f"{self.passes} passes"] * (self.passes > 1))


class Compared(NamedTuple):
    """A case with its planned and its measured peak, in bytes: what was in use, and what was resident."""

    case: Case
    planned: int
    in_use: int
    resident: int

    @property
    def ratio(self) -> float:
        """Planned over what was in use."""
        return self.planned / self.in_use

    @property
    def holds(self) -> bool:
        """Whether the plan is within 15 % of what was in use."""
        return abs(self.ratio - 1.0) <= FAR_SHARE

    def as_json(self) -> dict[str, int | float]:
        """Its bytes, and planned over in use."""
        counts = {"planned_bytes": self.planned, "in_use_bytes": self.in_use, "resident_bytes": self.resident}
        return {**counts, "planned_over_in_use": self.ratio}

    @classmethod
    def of(cls, case: Case) -> Self:
        """Train ``case`` in a process of its own; FailedError where that ends badly."""
        command = [sys.executable, "-m", "latentforge.train.memory_bench", json.dumps(asdict(case))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise FailedError(f"{case.name}: its process ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        return cls(case, case.planned, *json.loads(done.stdout))


def cases(size: Case) -> Iterator[Case]:
    """The ways in which a student of this size is trained."""
    for precision in ("fp32", "bf16"):
        for recomputed in (False, True):
            yield Case(**{**asdict(size), "precision": precision, "recomputed": recomputed})
    yield Case(**{**asdict(size), "passes": 2})
    for recomputed in (False, True):
        yield Case(**{**asdict(size), "rank": 16, "recomputed": recomputed})


def table(found: Iterable[Compared]) -> Iterator[str]:
    """The rows of the table, in MiB."""
    yield "| student | planned MiB | in use MiB | planned / in use | resident MiB |"
    yield "|---|---|---|---|---|"
    for one in found:
        size = f"{one.case.shape.parameters / 1e6:.1f} M, {one.case.name}"
        planned, in_use, resident = (f"{count / 2**20:.0f}" for count in one[1:])
        yield f"| {size} | {planned} | {in_use} | {one.ratio:.2f} | {resident} |"


def measured(case: Case) -> tuple[int, int]:
    """Bytes in use and bytes resident that this process held at most for the training of ``case``, beyond what it held
    before; FailedError where its C library counts nothing."""
    from latentforge.train.held import watching

    _train(Case(hidden=64, layers=1, vocabulary=97, rows=1, length=9, precision=case.precision, rank=case.rank))
    with watching(share=0.2) as watch:
        _train(case)
        peak = watch.peak()
    if peak.in_use is None:
        raise FailedError("what is in use is not known: glibc's own allocator tells it, and another one is loaded here")
    return peak.in_use - watch.before, peak.resident - watch.before


def _train(case: Case) -> None:
    import torch

    from latentforge.kernels.targets import Targets, TopKTargets
    from latentforge.students.adapters import Lora, adapt, trained_part
    from latentforge.students.causal import ModelShape as Shape
    from latentforge.students.causal import Student, cast_weights, new_model
    from latentforge.train.assembly import PRECISIONS
    from latentforge.train.engines.choice import Parts, Updates, engine_of
    from latentforge.train.loop import Objective, Trainer

    one, asked = case.shape, LoraSpec()
    shape = Shape(one.layers, one.hidden, one.heads, one.kv_heads, one.intermediate)
    model = new_model(shape, vocab_size=case.vocabulary, positions=case.length, eos_id=0, seed=1)
    if case.rank:
        adapt(model, Lora(case.rank, asked.alpha, 0.0, asked.target_modules), seed=1)
        cast_weights(model, PRECISIONS[case.precision])
    student = Student(model, case.vocabulary)
    if case.recomputed:
        student.checkpoint_activations()
    updates = Updates(learning_rate=1e-3, weight_decay=0.1, warmup_steps=1, steps=_STEPS, clip_norm=1.0)
    engine = engine_of("none", Parts(student, trained_part(model)), updates, precision=PRECISIONS[case.precision])
    trainer = Trainer(student, engine, Objective(1.0, 0.3, 0.7, "cpu"), micro_batch_size=case.rows)

    def targets(tokens: torch.Tensor) -> Targets:
        rows = tokens[:, :-1].numel()
        ids = torch.arange(8, dtype=torch.int32).repeat(rows, 1)
        logprobs = torch.log_softmax(torch.zeros(rows, 8), -1) - 0.25
        return TopKTargets(ids, logprobs, torch.log1p(-logprobs.exp().sum(-1)))

    for step in range(_STEPS):
        trainer.step(step, torch.randint(0, case.vocabulary, (case.rows * case.passes, case.length)), targets)


if __name__ == "__main__":
    print(json.dumps(measured(Case(**json.loads(sys.argv[1])))))
