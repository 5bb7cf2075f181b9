"""Small settings in which a claim about training is checked quickly: one tiny pipeline, one tiny student.

A pipeline is trained once a process; once for all processes that ``LATENTFORGE_REHEARSALS`` names one folder to.
"""

from __future__ import annotations

import fcntl
import io
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentforge.events import Event, read_events
from latentforge.spec.pipeline import Role
from latentforge.spec.resolve import resolve_pipeline
from latentforge.spec.run import RunDir
from latentforge.spec.sections import PipelineSpec
from latentforge.students.causal import ModelShape, Student, new_model
from latentforge.teachers.fixture import FixtureTeacher
from latentforge.train.engines.single import Single
from latentforge.train.inprocess import execute_pipeline
from latentforge.train.loop import Objective, TargetsOf, Trainer
from latentforge.train.optimiser import MasterOptimiser, Updates
from latentforge.train.setting import choose_kernel

VOCABULARY = 64
LENGTH = 12
SEQUENCES = 16


SHARED = "LATENTFORGE_REHEARSALS"
"""The variable that names the folder in which several processes keep what they train here."""


@cache
def _own_root() -> tempfile.TemporaryDirectory[str]:
    # Kept for the life of the process, so that all checks share one teacher; removed with it.
    return tempfile.TemporaryDirectory(prefix="latentforge-tiny-")


def rehearsed(recipe: str, spec: PipelineSpec) -> dict[Role, RunDir]:
    """The runs of that spec of a tiny recipe, by role: those that are there already are kept, by whomever they were
    trained. They are not to be changed.
    """
    root = Path(os.environ.get(SHARED) or _own_root().name)
    with open(root / f"{recipe}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who waits here finds the runs that he would have trained
        return execute_pipeline(spec, root, text=io.StringIO())


def tiny_spec(**distill: Any) -> PipelineSpec:
    """The recipe ``tiny`` with some values of its distill section replaced (``frozen`` and ``init`` the student's)."""
    spec = resolve_pipeline("tiny", env={}, overrides=()).spec
    of_student: dict[str, Any] = {name: distill.pop(name) for name in ("frozen", "init") if name in distill}
    student = spec.distill.student.model_copy(update=of_student)
    section = type(spec.distill).model_validate({**spec.distill.model_dump(), **distill, "student": student})
    return spec.model_copy(update={"distill": section})


@cache
def _tiny_run(frozen: bool, kd_weight: float | None) -> RunDir:
    weights = {} if kd_weight is None else {"kd_weight": kd_weight}
    spec = tiny_spec(frozen=frozen, **weights)
    return rehearsed("tiny", spec)["distill"]


def tiny_run(*, frozen: bool = False, kd_weight: float | None = None) -> RunDir:
    """The distill run of ``tiny``, trained once a process for each setting; data, teacher and targets are shared."""
    return _tiny_run(frozen, kd_weight)


def tiny_events(*, frozen: bool = False, kd_weight: float | None = None) -> list[Event]:
    """The events of :func:`tiny_run`."""
    return read_events(tiny_run(frozen=frozen, kd_weight=kd_weight).events_file)


@cache
def _tiny_codec_run(collapsed: bool) -> RunDir:
    planted = ("autoencoder.kl_weight=1.0", "autoencoder.kl_floor=0.0", "autoencoder.steps=60") if collapsed else ()
    spec = resolve_pipeline("tiny-autoencoder", env={}, overrides=planted).spec
    return rehearsed("tiny-autoencoder", spec)["autoencoder"]


def tiny_codec_events(*, collapsed: bool = False) -> list[Event]:
    """The events of the recipe ``tiny-autoencoder``, trained once a process; ``collapsed``: with the KL at full weight
    and no free bits, and fewer steps."""
    return read_events(_tiny_codec_run(collapsed).events_file)


@cache
def tiny_latent_run(*, frozen: bool = False) -> RunDir:
    """The latent run of ``tiny-latent``, trained once a process; what it is made from is shared. ``frozen``: a student
    that learns nothing."""
    planted = ("latent.student.frozen=true", "latent.steps=4", "latent.checkpoint_every=2") if frozen else ()
    spec = resolve_pipeline("tiny-latent", env={}, overrides=planted).spec
    return rehearsed("tiny-latent", spec)["latent"]


def tiny_latent_events(*, frozen: bool = False) -> list[Event]:
    """The events of :func:`tiny_latent_run`."""
    return read_events(tiny_latent_run(frozen=frozen).events_file)


def small_trainer(
    *,
    learning_rate: float = 3e-3,
    warmup_steps: int = 0,
    steps: int = 100,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    micro_batch_size: int | None = None,
    precision: torch.dtype = torch.float32,
    clip_norm: float | None = None,
    weight_decay: float = 0.0,
    device: str = "cpu",
) -> Trainer:
    """A one-layer student of 64 tokens with its optimiser; always the same start, on every device."""
    shape = ModelShape(layers=1, hidden=32, heads=2, kv_heads=1, intermediate=64)
    model = new_model(shape, vocab_size=VOCABULARY, positions=LENGTH, eos_id=0, seed=3).to(device, precision)
    optimiser = MasterOptimiser(model, Updates(learning_rate, weight_decay, warmup_steps, steps, clip_norm))
    kernel, _ = choose_kernel(torch.device(device), precision)
    objective = Objective(1.0, ce_weight, kd_weight, kernel)
    student = Student(model, VOCABULARY)
    return Trainer(student, Single(student, optimiser), objective, micro_batch_size=micro_batch_size)


def small_batch(seed: int = 5) -> Tensor:
    """Tokens int64 [16, 12] below 64."""
    return torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(seed))


def fixture_targets() -> TargetsOf:
    """Dense targets whose preferred token is the last one given."""
    teacher = FixtureTeacher(VOCABULARY)
    return lambda tokens: teacher.targets(tokens, temperature=1.0)
