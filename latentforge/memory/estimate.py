"""Closed-form memory of each run of a pipeline: weights, states, activations, logits, attention, runtime.

Constants: ``reference`` GB10 notes, section (c).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from latentforge.memory.activations import activation_bytes, attention_bytes
from latentforge.memory.bench import pipeline_bench_memory
from latentforge.memory.codec import autoencoder_memory
from latentforge.memory.continuing import continuations_memory
from latentforge.memory.engine import EngineSetting, engine_terms
from latentforge.memory.known import KnownModel, Precision
from latentforge.memory.latent import latent_memory
from latentforge.memory.plan import CHECKPOINT, SAVED, MemoryPlan, Term, largest, runtime
from latentforge.memory.shape import ModelShape
from latentforge.memory.spread import WIDTH, Spread
from latentforge.memory.training import Step, adapter_parameters, training_terms
from latentforge.spec.choice import auto_of
from latentforge.spec.sections import DistillSpec, PipelineSpec, StudentSpec, TeacherSpec

Place = Literal["process", "engine", "nowhere"]
TWIN = "F-DISTILL-SMOKE-002"


def teacher_shape(spec: TeacherSpec, vocab_size: int) -> ModelShape:
    """The shape of the small teacher that a pipeline trains."""
    return ModelShape.qwen3(
        vocab_size,
        layers=spec.layers,
        hidden=spec.hidden,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        intermediate=spec.intermediate,
    )


def student_shape(spec: StudentSpec, vocab_size: int) -> ModelShape:
    """The shape of the student that a pipeline makes."""
    return ModelShape.qwen3(
        vocab_size,
        layers=spec.layers,
        hidden=spec.hidden,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        intermediate=spec.intermediate,
    )


@dataclass(frozen=True)
class Answering:
    """How the teacher of a run answers: in this process (``hf``), in an engine of ours, or from where it takes nothing.

    ``model`` is what is known of its folder; ``device`` ``cpu`` or ``cuda``.
    """

    model: KnownModel
    place: Place
    precision: Precision
    device: str
    engine: EngineSetting | None = None

    @classmethod
    def of(cls, spec: TeacherSpec, model: KnownModel, *, device: str) -> Answering:
        """The teacher of a spec."""
        place = place_of(spec)
        engine = EngineSetting.of(spec, model) if place == "engine" else None
        return cls(model, place, spec.precision, device, engine)

    def terms(self, rows: int, length: int, *, copies: int) -> tuple[list[Term], list[str]]:
        """Its terms for ``rows`` sequences a forward pass, and the names of what could not be counted."""
        if self.place == "nowhere":
            return [], []
        if self.engine is not None:
            return engine_terms(self.model, self.engine, self.device)
        weights = self.model.weights(self.precision, self.device)
        least = weights if weights is not None else self.model.bytes or 0
        known = weights is not None and self.model.shape is not None
        return _inference(self.model.shape, least, rows, length, copies=copies), [] if known else ["the teacher"]

    @property
    def load(self) -> tuple[int, int]:
        """While it is loaded into this process: its weights with the largest file, and the pages of its other files.

        Numbers that stay as they lie in the file are mapped from it, not copied.
        """
        if self.place != "process":
            return 0, 0
        files = self.model.bytes or 0
        weights = self.model.weights(self.precision, self.device) or files
        if weights == files and self.device == "cpu":
            return weights, 0
        largest = min(files, self.model.largest_file or files)
        return weights + largest, files - largest


def place_of(spec: TeacherSpec) -> Place:
    """Where a teacher's memory is held: the run's process, an engine of ours beside it, or nowhere on this host."""
    backend: str = spec.backend
    if backend == "auto":
        backend, _why = auto_of(spec)
    if backend == "hf":
        return "process"
    return "engine" if backend in ("vllm-local", "vllm-local-inproc") else "nowhere"


def teacher_memory(spec: TeacherSpec, shape: ModelShape, *, length: int, device: str) -> MemoryPlan:
    """The plan of a run that trains a small teacher."""
    step = Step(spec.batch_size, length, accumulates=False, saved_last=spec.checkpoint_every >= spec.steps)
    terms = training_terms(shape, step, who="teacher", device=device)
    return MemoryPlan("teacher", (*terms, runtime(device)))


def score_memory(teacher: Answering, *, rows: int, length: int) -> MemoryPlan:
    """The plan of a run that asks a teacher for ``rows`` sequences of ``length`` tokens at a time."""
    terms, unknown = teacher.terms(rows, length, copies=3)
    return MemoryPlan("score", (*terms, runtime(teacher.device)), tuple(unknown), *teacher.load)


def distill_memory(
    spec: DistillSpec,
    teacher: Answering | None,
    student: KnownModel,
    *,
    length: int,
    device: str,
    live: bool,
    rows_told: RowsTold | None = None,
    hosts: int = 1,
    leads: bool = True,
) -> MemoryPlan:
    """The plan of a run that trains a student; ``teacher`` is what stands in memory beside it (None: nothing).

    ``live`` says that it answers every step; else it is loaded at the end, in fp32, for a sample. ``rows_told``: how
    its targets come as rows; None where they are dense. It is the plan of one of ``hosts``, of which the first
    ``leads``.
    """
    step = step_of(spec, length, hosts)
    rows = step.rows
    if teacher is not None and not live:
        teacher = replace(teacher, precision="fp32")
    terms, unknown = teacher.terms(rows, length, copies=2 if live else 1) if teacher is not None else ([], [])
    if student.shape is None:
        unknown = [*unknown, "the student"]
    else:
        count = student.shape.parameters
        if spec.lora.rank:
            adapters = adapter_parameters(student.shape, spec.lora)
            unknown = unknown if adapters is not None else [*unknown, "the adapters"]
            step = replace(step, adapters=adapters or 0)
        trained = training_terms(student.shape, step, who="student", device=device)
        start = Term("start", 4 * count)  # what the student, and its twin, are copies of
        terms = [*terms, *trained, start]
        if spec.lora.rank:
            # At the end the adapters are merged into a copy, which is read back: no pass is made any more.
            passing = sum(term.bytes for term in trained if term.name in _PASSING)
            copies = (1 + (TWIN in spec.require)) * 4 * count + WIDTH[spec.precision] * count
            terms.append(Term("merged", max(0, copies - passing)))
        if step.spread.engine != "none":
            # At the end student and twin are gathered, each beside a model of its own: no pass is made any more.
            later = sum(term.bytes for term in trained if term.name in (*_PASSING, CHECKPOINT))
            terms.append(Term(SAVED, max(0, (1 + (TWIN in spec.require)) * 2 * 4 * count - later)))
        if TWIN in spec.require:
            terms.append(Term("twin", sum(term.bytes for term in trained if term.name in _LASTING)))
        if live and spec.targets == "live" and teacher is not None and teacher.place == "process":
            held = ahead_bytes(spec.prefetch, spec.batch_size, length, student.shape.vocab_size)
            terms.append(Term("ahead", held // step.spread.world))
    if rows_told is not None:
        share = step.spread.rows(spec.batch_size, None)
        terms.append(Term("targets", rows_told.bytes(spec.prefetch, share, length)))
    load = teacher.load if teacher is not None else (0, 0)
    plan = MemoryPlan("distill", (*_joined(terms), runtime(device)), tuple(unknown), *load)
    return plan.on(spec.processes, first=leads)


def step_of(spec: DistillSpec, length: int, hosts: int = 1) -> Step:
    """How a spec's token-level student is trained on rows of ``length`` tokens, as far as its memory goes."""
    spread = Spread.of(spec.distributed, spec.processes, hosts)
    rows = spread.rows(spec.batch_size, spec.micro_batch_size)
    accumulates = rows < spread.rows(spec.batch_size, None)
    again, saved_last = spec.activation_checkpointing, spec.checkpoint_every >= spec.steps
    return Step(rows, length, spec.precision, accumulates, again, spread=spread, saved_last=saved_last)


class RowsTold(NamedTuple):
    """Targets that come as rows: ``entries`` a position, each an id and a log-probability; ``kept`` held-out sequences
    of a teacher that is not asked for them twice."""

    entries: int
    kept: int = 0

    def bytes(self, ahead: int, batch: int, length: int) -> int:
        """What is held of them at most: of so many batches ``ahead``, of the step's own, of one that is put together,
        and of held-out sequences."""
        return (8 * self.entries + 4) * (length - 1) * ((ahead + 2) * batch + self.kept)


AHEAD_BYTES = 1 << 30
"""Dense targets of a teacher in process are held ahead of their steps up to here, and not at all beyond."""


def ahead_bytes(batches: int, rows: int, length: int, vocab_size: int) -> int:
    """What the dense targets of ``batches`` batches of ``rows`` rows take that are fetched before they are used: 0
    where all of them together are more than :data:`AHEAD_BYTES`, and each is made when it is needed.
    """
    wanted = batches * rows * (length - 1) * vocab_size * 4
    return wanted if wanted <= AHEAD_BYTES else 0


def pipeline_memory(
    spec: PipelineSpec,
    *,
    device: str = "cpu",
    teacher: KnownModel | None = None,
    student: KnownModel | None = None,
    hosts: int = 1,
) -> dict[str, MemoryPlan]:
    """The plan of each run of an effective pipeline, by kind, for ``device`` ``cpu`` or ``cuda``, on the first of so
    many ``hosts``.

    ``teacher`` and ``student`` are what is known of folders that the spec names. Where a folder's shape is not known,
    the plans that need it say so in ``unknown``; the size of its weights on disk is then the least that it takes. A
    student is trained from fp32, whatever its folder keeps.
    """
    length = spec.data.sequence_length
    plans: dict[str, MemoryPlan] = {}
    tokens = (teacher.vocabulary if teacher is not None else None) or spec.data.vocab_size
    sizes: dict[str, Any] = {"chunk": spec.data.chunk, "length": length, "vocab_size": tokens, "device": device}
    sizes["hosts"] = hosts
    if spec.has_teacher:
        plans = _of_teacher_and_student(spec, teacher, student, device, hosts)
    if spec.through != "distill":
        plans["autoencoder"] = autoencoder_memory(spec.autoencoder, **sizes)
    if spec.through == "latent":
        asked = spec.continuations if spec.continues else None
        plans["latent"] = latent_memory(spec.latent, spec.autoencoder, continuations=asked, **sizes)
    if spec.benches:
        token = _student(spec, teacher, student) if spec.distils else None
        plans["bench"] = pipeline_bench_memory(spec, token, vocab_size=tokens, device=device)
    return plans


def _student(spec: PipelineSpec, teacher: KnownModel | None, student: KnownModel | None) -> KnownModel:
    """What is known of the token-level student: its folder's, or its shape with the data's vocabulary."""
    if spec.distill.student.init is not None:
        return student or KnownModel()
    width = teacher.vocabulary if teacher is not None and spec.teacher.model is not None else None
    return KnownModel.of_shape(student_shape(spec.distill.student, width or spec.data.vocab_size))


def _of_teacher_and_student(
    spec: PipelineSpec, teacher: KnownModel | None, student: KnownModel | None, device: str, hosts: int
) -> dict[str, MemoryPlan]:
    """The plans of the runs that train a teacher, ask it, and train a token-level student."""
    length = spec.data.sequence_length
    plans: dict[str, MemoryPlan] = {}
    if spec.teacher.model is None:
        own = teacher_shape(spec.teacher, spec.data.vocab_size)
        teacher = KnownModel.of_shape(own)
        plans["teacher"] = teacher_memory(spec.teacher, own, length=length, device=device)
    teacher = teacher or KnownModel()
    answering = Answering.of(spec.teacher, teacher, device=device)
    if spec.scores or (spec.distils and spec.distill.targets == "store"):
        plans["score"] = score_memory(answering, rows=spec.score.batch_size, length=length)
    if spec.continues:
        plans["continuations"] = continuations_memory(
            answering, spec.continuations, chunk=spec.data.chunk, length=length
        )
    if not spec.distils:
        return plans
    live = spec.distill.targets != "store" or spec.distill.on_policy > 0
    told = None
    if not (spec.distill.targets == "live" and answering.place == "process"):
        stored = spec.distill.targets == "store"
        entries = spec.score.draws if stored and spec.score.mode == "sample" else spec.score.k
        told = RowsTold(entries, 0 if stored else spec.data.heldout_sequences)
    # With a store a full run never loads its teacher; a smoke run does, to show what it would have written.
    beside = live or (spec.profile == "smoke" and answering.place == "process")
    plans["distill"] = distill_memory(
        spec.distill,
        answering if beside else None,
        _student(spec, teacher, student),
        length=length,
        device=device,
        live=live,
        rows_told=told,
        hosts=hosts,
    )
    return plans


def pipeline_peak(
    spec: PipelineSpec,
    *,
    device: str = "cpu",
    teacher: KnownModel | None = None,
    student: KnownModel | None = None,
    hosts: int = 1,
) -> MemoryPlan:
    """The largest plan of a pipeline, whose runs are made one after the other (arguments of ``pipeline_memory``)."""
    return largest(pipeline_memory(spec, device=device, teacher=teacher, student=student, hosts=hosts).values())


def _inference(shape: ModelShape | None, weights: int, rows: int, length: int, *, copies: int) -> list[Term]:
    """A teacher that answers in process: weights, one layer's activations, its logits, one layer's attention."""
    if shape is None:
        return [Term("teacher", weights)]
    return [
        Term("teacher", weights),
        Term("activations", activation_bytes(shape, rows * length) // shape.layers),
        Term("logits", copies * 4 * rows * length * shape.vocab_size),
        Term("attention", attention_bytes(shape, rows, length)),
    ]


_ORDER = (
    *("teacher", "kv", "sequences", "logprobs", "engine", "engine host"),
    *("student", "student share", "start", "twin", "states", CHECKPOINT, "merged", SAVED),
    *("buckets", "gathered", "activations", "logits", "ahead", "targets", "attention", "runtime"),
)
_PASSING = ("activations", "logits", "attention")
_LASTING = ("student", "student share", "states")
"""What a student still holds when its twin is trained."""


def _joined(terms: list[Term]) -> list[Term]:
    """Terms of one name and process added up, in the order in which a plan shows them."""
    keys = sorted({(term.name, term.elsewhere) for term in terms}, key=lambda key: _ORDER.index(key[0]))
    return [Term(key[0], sum(t.bytes for t in terms if (t.name, t.elsewhere) == key), key[1]) for key in keys]
