"""What a request needs of its host, in closed form: memory, disk and inodes term by term, and what the package must
be able to do there."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dispatch.building.build import BuildNames
from dispatch.hosts.facts import HostFacts
from dispatch.planning.ask import Ask
from latentforge.errors import RefusedError
from latentforge.memory import KnownModel, MemoryPlan, ModelShape, Term, pipeline_peak
from latentforge.memory.codec import codec_parameters
from latentforge.memory.estimate import TWIN, student_shape, teacher_shape
from latentforge.memory.latent import continuation_bytes, latent_parameters
from latentforge.spec.capabilities import wanted_of
from latentforge.spec.endurance import checkpoints_of
from latentforge.spec.latent import AutoencoderSpec, LatentSpec
from latentforge.spec.pipeline import BUILTIN_CORPUS
from latentforge.spec.sections import DistillSpec, PipelineSpec, TeacherSpec

GIB = 2**30
_ENVIRONMENT = {"cpu": (int(1.2 * GIB), 30_000)}
"""Bytes and files of the environment that a lock file makes, measured for ``cpu``."""
_LARGER_ENVIRONMENT = (7 * GIB, 60_000)
"""With CUDA wheels: torch and its libraries."""
_BUILT = (200 << 20, 1_000)
_BUILTIN_BYTES = 64 << 20
_RUN = (64 << 20, 200)
"""Log, events and small files of one run."""


@dataclass(frozen=True)
class Need:
    """What is needed. ``memory`` None: no pipeline was named, or its models' size is not known (``why``)."""

    pipeline: str | None = None
    memory: MemoryPlan | None = None
    notes: tuple[str, ...] = ()
    disk: tuple[Term, ...] = ()
    inodes: int = 0
    compiles: bool = False
    in_place: bool = False
    wanted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    only_command: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of memory at the largest moment; 0 without a pipeline."""
        return self.memory.bytes if self.memory is not None else 0

    @property
    def disk_bytes(self) -> int:
        """Bytes that will be written to the run's file system."""
        return sum(term.bytes for term in self.disk)


def need_of(ask: Ask, facts: HostFacts) -> Need:
    """The need of a pipeline on the host that these facts are of."""
    memory, notes = memory_need(ask, facts)
    disk, inodes, compiles = _disk(ask, facts, memory)
    return Need(
        pipeline=ask.recipe,
        memory=memory,
        notes=notes,
        disk=disk,
        inodes=inodes,
        compiles=compiles,
        in_place=ask.bundle is None,
        wanted=wanted_of(ask.spec),
        only_command=f"latentforge dispatch preflight {shlex.quote(ask.host.name)} --for {shlex.quote(ask.recipe)}",
    )


@dataclass(frozen=True)
class Models:
    """What is known of a pipeline's models: its own, and those of folders as their ``config.json`` states them."""

    teacher: KnownModel
    student: KnownModel
    troubles: tuple[str, ...] = ()

    @classmethod
    def of(cls, ask: Ask, facts: HostFacts) -> Models:
        """The models, as far as the host's answer tells them."""
        spec, troubles = ask.spec, []
        known = facts.preflight.models if facts.preflight is not None else {}

        def model(path: str) -> KnownModel:
            found = known.get(path)
            if found is None or found.config is None:
                troubles.append(f"{path}: {found.reason if found and found.reason else 'its config.json was not read'}")
                return KnownModel()
            try:
                told = KnownModel.of_config(found.config, found.bytes or None)
            except RefusedError as error:
                troubles.append(f"{path}: {error}")
                return KnownModel()
            troubles.extend(f"{path}: {trouble}" for trouble in told.troubles)
            return told

        if spec.teacher.model is not None:
            teacher = model(spec.teacher.model)
        else:
            teacher = KnownModel.of_shape(teacher_shape(spec.teacher, spec.data.vocab_size))
        if (init := spec.distill.student.init) is not None:
            student = model(init)
        else:
            student = KnownModel.of_shape(
                student_shape(spec.distill.student, teacher.vocabulary or spec.data.vocab_size)
            )
        return cls(teacher, student, tuple(troubles))


def memory_need(ask: Ask, facts: HostFacts) -> tuple[MemoryPlan, tuple[str, ...]]:
    """The largest plan of the pipeline, and sentences that explain its terms."""
    models = Models.of(ask, facts)
    device = "cuda" if facts.host.gpus else "cpu"
    hosts = max(1, len(ask.hosts))
    plan = pipeline_peak(ask.spec, device=device, teacher=models.teacher, student=models.student, hosts=hosts)
    length = ask.spec.data.sequence_length
    notes = list(models.troubles)
    named = {"teacher": ask.spec.teacher.model, "student": ask.spec.distill.student.init}
    for who, model in (("teacher", models.teacher), ("student", models.student)):
        if named[who] is None:
            continue
        if model.shape is not None:
            notes.append(f"{who}: {attention_note(model.shape, length)}")
        if who == "teacher" and model.cache is not None:
            notes.append(
                f"teacher: {model.cache.kv_bytes(1) / 2**10:.0f} KiB of keys and values a token where it caches"
            )
    return plan, tuple(notes)


def attention_note(shape: ModelShape, length: int) -> str:
    """The scores of one sequence in one block, as a sum that can be checked by hand."""
    block = 4 * shape.heads * length * length
    return (
        f"attention {shape.heads} heads x {length}^2 x 4 B = {block / 1e9:.1f} GB a sequence and block, "
        f"{shape.layers} blocks"
    )


def _disk(ask: Ask, facts: HostFacts, memory: MemoryPlan) -> tuple[tuple[Term, ...], int, bool]:
    spec, models = ask.spec, Models.of(ask, facts)
    terms: list[Term] = []
    inodes, compiles = 0, False
    if ask.bundle is not None:
        names = BuildNames.of(ask)
        if not facts.venvs.get(names.venv):
            size, files = _ENVIRONMENT.get(ask.lock_name, _LARGER_ENVIRONMENT)
            terms.append(Term("environment", size))
            inodes += files
        if not facts.builds.get(names.build):
            terms.append(Term("build", _BUILT[0] + 2 * ask.bundle.size))
            inodes += _BUILT[1]
            compiles = True
    if missing := sum(found.bytes or 0 for found in facts.paths.values() if found.absent and found.ok):
        terms.append(Term("models", missing))
    tokens = _tokens(ask, facts)
    terms.append(Term("data", 4 * tokens))
    terms += _latent_terms(spec, models, tokens)
    runs = max(4, len(wanted_of(spec)["kinds"])) if spec.distils else len(wanted_of(spec)["kinds"])
    if spec.has_teacher and spec.teacher.model is None and models.teacher.shape is not None:
        terms.append(Term("teacher", models.teacher.shape.parameters * (4 + 12 * _checkpoints(spec, spec.teacher))))
    if spec.scores or (spec.distils and spec.distill.targets == "store"):
        row = spec.score.k * 6 + 4 * len(spec.score.temperatures) + 8
        terms.append(Term("targets", tokens * row))
    if spec.distils and models.student.shape is not None:
        states = 16 if spec.distill.precision == "bf16" else 12
        students = 2 if TWIN in spec.distill.require else 1
        each = 4 + states * _checkpoints(spec, spec.distill)
        terms.append(Term("student", models.student.shape.parameters * each * students))
    if spec.benches and spec.through == "distill" and models.student.shape is not None:
        terms.append(Term("bench", 4 * models.student.shape.parameters))  # the student that it measured
    if spec.profile == "full" and (long := [term for term in terms if term.name in ("student", "latent student")]):
        # A canary leaves what its full run leaves: a student, and the newest of its checkpoints.
        terms.append(Term("canaries", sum(term.bytes for term in long)))
        runs += len(long)
    terms.append(Term("logs", runs * _RUN[0]))
    return tuple(terms), inodes + runs * _RUN[1], compiles


def _checkpoints(spec: PipelineSpec, section: TeacherSpec | DistillSpec | AutoencoderSpec | LatentSpec) -> int:
    return checkpoints_of(spec.endurance, steps=section.steps, every=section.checkpoint_every, keep=section.keep)


def _latent_terms(spec: PipelineSpec, models: Models, tokens: int) -> list[Term]:
    """Codec, continuations and latent student on disk; nothing where none is made."""
    terms: list[Term] = []
    known = {"chunk": spec.data.chunk, "vocab_size": models.teacher.vocabulary or spec.data.vocab_size}
    codec = codec_parameters(spec.autoencoder, **known)
    if spec.through != "distill":
        terms.append(Term("codec", codec * (4 + 12 * _checkpoints(spec, spec.autoencoder))))
    if spec.continues:
        rows = tokens // spec.data.sequence_length
        if spec.continuations.rows is not None:
            rows = min(rows, spec.continuations.rows + spec.data.heldout_sequences)
        size = continuation_bytes(spec.continuations, length=spec.data.sequence_length, rows=rows)
        terms.append(Term("continuations", size))
    if spec.through == "latent":
        count = latent_parameters(spec.latent, latent=spec.autoencoder.latent, **known)
        states = 16 if spec.latent.precision == "bf16" else 12
        terms.append(Term("latent student", count * (4 + states * _checkpoints(spec, spec.latent)) + 4 * codec))
        if spec.benches:
            terms.append(Term("bench", 4 * (count + codec)))
    return terms


def _tokens(ask: Ask, facts: HostFacts) -> int:
    """Tokens that the data run writes, at most: of one byte come at most two, usually far fewer."""
    data = ask.spec.data
    if data.train_sequences is not None:
        return (data.train_sequences + data.heldout_sequences) * data.sequence_length
    if data.corpus == BUILTIN_CORPUS:
        return _BUILTIN_BYTES
    found: Any = facts.paths.get(data.corpus)
    size = found.documents_bytes if found is not None else None
    return int(size) if size else _BUILTIN_BYTES
