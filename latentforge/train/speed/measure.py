"""Timing of a trainer's real steps, part by part, beside steps of plain cross-entropy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentforge.data.order import BatchOrder
from latentforge.kernels.api import kd_loss
from latentforge.spec.sections import PipelineSpec
from latentforge.students.causal import (
    IGNORE,
    LossParts,
    ModelShape,
    Student,
    cast_weights,
    model_from_folder,
    new_model,
)
from latentforge.targets.store import TargetStore
from latentforge.teachers.store import StoreTeacher
from latentforge.train.assembly import PRECISIONS, layers_of
from latentforge.train.compiled import CompiledLayers
from latentforge.train.engines.single import Single
from latentforge.train.feed import Feed
from latentforge.train.flops import training_flops
from latentforge.train.loop import Lesson, Objective, Trainer
from latentforge.train.optimiser import MasterOptimiser, Updates
from latentforge.train.setting import choose_device, choose_kernel, fit_threads, training_batch
from latentforge.train.speed.material import Material
from latentforge.train.supply import Supply

PARTS = ("data and targets", "forward", "backward", "optimiser", "rest")
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Breakdown:
    """Where the time of a step went: the median one, by its seconds, of ``steps`` steps of each kind.

    ``parts`` is by :data:`PARTS` and sums to ``step``; ``kernel`` is what the KD kernel alone takes of the
    forward pass, ``fetch`` what reading and unpacking targets took on its own thread, of which ``hidden`` ran beside
    the student.
    ``plain`` is a step of cross-entropy alone on the same batches, ``eager`` (where layers are compiled) one like the
    measured ones without that. ``flops`` are the model's a step (6 a weight and
    token, attention included), ``peak`` the operations a second of a square matrix product in the same precision.
    """

    device: str
    threads: int
    precision: str
    parameters: int
    vocab_size: int
    sequences: int
    length: int
    micro_batch: int
    k: int
    prefetch: int
    steps: int
    step: float
    parts: dict[str, float]
    kernel: float
    fetch: float
    hidden: float
    plain: float
    flops: float
    peak: float
    eager: float | None = None

    @property
    def overhead(self) -> float:
        """What KD takes over plain cross-entropy, as a share of the plain step."""
        return self.step / self.plain - 1.0

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation: the model's operations over what the matrix product would have done meanwhile."""
        return self.flops / self.step / self.peak

    def as_json(self) -> dict[str, Any]:
        """The same as JSON-able data."""
        return {**asdict(self), "overhead": self.overhead, "utilisation": self.utilisation}


class _Clock:
    """Seconds by part; on a GPU what was asked for is waited for before the clock is read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = self.now()
        yield
        self.add(name, self.now() - began)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class _TimedOptimiser(MasterOptimiser):
    """The optimiser, of which is known when a backward pass ended and how long an update took."""

    clock: _Clock
    forward_ended: float

    def collect(self) -> None:
        self.clock.add("backward", self.clock.now() - self.forward_ended)
        with self.clock.part("optimiser"):
            super().collect()

    def step(self) -> float:
        with self.clock.part("optimiser"):
            return super().step()


class _TimedTrainer(Trainer):
    """The trainer, of which is known how long its forward passes took."""

    def pass_over(self, lesson: Lesson, denominator: int) -> LossParts:
        timed = self.optimiser
        assert isinstance(timed, _TimedOptimiser)
        with timed.clock.part("forward"):
            found = super().pass_over(lesson, denominator)
        timed.forward_ended = timed.clock.now()
        return found


def measure(spec: PipelineSpec, material: Material, *, steps: int, say: Say = lambda line: None) -> Breakdown:
    """Take ``steps`` steps with targets and as many without, each block of them after a step that is not counted.

    Those with targets are taken before the others and after them, half each: a machine that grows slower does so for
    both, and no target is fetched while a step without any is timed. Where layers are compiled, as many steps are taken
    without that, again half before all others and half after them. What is trained is the student of ``spec.distill``
    on rows of ``spec.data``; RefusedError where device or kernel are not there.
    """
    distill = spec.distill
    device = choose_device(distill.device)
    dtype = PRECISIONS[distill.precision]
    kernel, slow = choose_kernel(device, dtype)
    if slow:
        say(slow)
    vocab_size, length = spec.data.vocab_size, spec.data.sequence_length
    model = _student(spec).to(device)
    cast_weights(model, dtype)
    flops = training_flops(model, length - 1, distill.batch_size * (length - 1))
    threads = fit_threads(flops)
    clock = _Clock(device)
    updates = Updates(
        learning_rate=distill.learning_rate,
        weight_decay=distill.weight_decay,
        warmup_steps=distill.warmup_steps,
        steps=max(distill.steps, 3 * steps + 5),
        clip_norm=distill.clip_norm,
    )
    optimiser = _TimedOptimiser(model, updates)
    optimiser.clock = clock
    taught = Objective(1.0, distill.ce_weight, distill.kd_weight, kernel)
    plain = replace(taught, ce_weight=1.0, kd_weight=0.0)
    student = Student(model, vocab_size)
    engine = Single(student, optimiser)
    compiled = CompiledLayers(layers_of(model), device) if distill.compile else None
    trainer = _TimedTrainer(student, engine, taught, micro_batch_size=distill.micro_batch_size)
    order = BatchOrder(len(material.shard), distill.batch_size, spec.seed)

    def batch_of(step: int) -> Tensor:
        return training_batch(material.shard, order, step, device)

    taken: dict[str, list[_Taken]] = {"with targets": [], "without targets": [], "without torch.compile": []}
    half = (steps + 1) // 2
    first, last = range(half + 1), range(half, steps + 1)
    blocks = [("with targets", first), ("without targets", range(steps + 1)), ("with targets", last)]
    if compiled is not None:
        blocks = [("without torch.compile", first), *blocks, ("without torch.compile", last)]
    with TargetStore.open(material.store, cache_bytes=0) as store:
        supply = Supply(
            StoreTeacher(store),
            temperature=1.0,
            k=store.k,
            width=vocab_size,
            on_loss="stop",
            ce_alone=1.0,
            live=False,
        )
        for name, block in blocks:
            if len(block) == 1:  # the step that is not counted, alone
                continue
            kd = name != "without targets"
            trainer.objective = taught if kd else plain
            if compiled is not None:
                compiled.on = name != "without torch.compile"
                trainer.compiled = compiled if compiled.on else None
            micro, ahead, source = distill.micro_batch_size, distill.prefetch if kd else 0, supply if kd else None
            with Feed(batch_of, block, supply=source, ahead=ahead, micro_batch_size=micro) as feed:
                for step in block:
                    say(f"step {step} of {steps}, {name}")
                    found = _take(trainer, feed, step, clock)
                    taken[name] += [found] if step > block.start else []
        kernel_seconds = _kernel_seconds(trainer, taught, supply, batch_of(0), clock)
    with_kd = taken["with targets"]
    middle = _middle(with_kd)
    fetch = sum(one.fetch for one in with_kd)
    return Breakdown(
        device=device.type,
        threads=threads,
        precision=distill.precision,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocab_size=vocab_size,
        sequences=distill.batch_size,
        length=length,
        micro_batch=distill.micro_batch_size or distill.batch_size,
        k=spec.score.k,
        prefetch=distill.prefetch,
        steps=steps,
        step=middle.seconds,
        parts=middle.parts,
        kernel=kernel_seconds,
        fetch=fetch / steps,
        hidden=sum(one.hidden for one in with_kd) / fetch if fetch else 1.0,
        plain=_middle(taken["without targets"]).seconds,
        flops=flops,
        peak=matmul_peak(device, dtype),
        eager=None if compiled is None else _middle(taken["without torch.compile"]).seconds,
    )


def _student(spec: PipelineSpec) -> Any:
    asked = spec.distill.student
    if asked.init is not None:
        return model_from_folder(Path(asked.init))
    shape = ModelShape(asked.layers, asked.hidden, asked.heads, asked.kv_heads, asked.intermediate)
    positions = spec.data.sequence_length
    return new_model(shape, vocab_size=spec.data.vocab_size, positions=positions, eos_id=0, seed=spec.seed)


@dataclass(frozen=True)
class _Taken:
    seconds: float
    parts: dict[str, float]
    fetch: float
    hidden: float


def _middle(taken: list[_Taken]) -> _Taken:
    return sorted(taken, key=lambda one: one.seconds)[(len(taken) - 1) // 2]


def _take(trainer: Trainer, feed: Feed, step: int, clock: _Clock) -> _Taken:
    clock.seconds = {}
    began = clock.now()
    with clock.part("data and targets"):
        given = feed.next(step, trainer.student)
    trainer.step(step, given.tokens, given.lessons)
    seconds = clock.now() - began
    named = {name: clock.seconds.get(name, 0.0) for name in PARTS[:-1]}
    fields = given.fields
    return _Taken(
        seconds,
        {**named, "rest": seconds - sum(named.values())},
        fields.get("target_seconds", 0.0),
        fields.get("target_hidden_seconds", 0.0),
    )


def _kernel_seconds(trainer: Trainer, objective: Objective, supply: Supply, tokens: Tensor, clock: _Clock) -> float:
    """What the KD kernel takes for a batch: its own call on the logits of one micro-batch, best of three."""
    student = trainer.student
    part = tokens[: trainer.micro_batch_size or len(tokens)]
    targets, labels = supply.targets(part), student.labels(part)
    best = float("inf")
    for _ in range(3):
        logits = student.logits(part)
        began = clock.now()
        kd_loss(
            logits,
            targets,
            labels,
            temperature=objective.temperature,
            ce_weight=objective.ce_weight,
            kd_weight=objective.kd_weight,
            denominator=float(len(labels)),
            ignore_index=IGNORE,
            backend=objective.kernel_backend,
        )
        best = min(best, clock.now() - began)
    return best * len(tokens) / len(part)


def matmul_peak(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> float:
    """Operations a second of the best of ``rounds`` products of two square matrices, after one that is not counted."""
    size = PEAK_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock = _Clock(device)
    best = float("inf")
    a @ b
    for _ in range(rounds):
        began = clock.now()
        a @ b
        best = min(best, clock.now() - began)
    return 2.0 * size**3 / best
