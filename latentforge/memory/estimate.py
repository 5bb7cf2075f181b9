"""Closed-form memory of each run of a pipeline: weights, states, activations, logits, attention, runtime.

Activation bytes a token are those that autograd keeps for transformers' Qwen3 with SDPA, rounded up; a test holds them
against the tensors that torch really saves. Other constants: ``reference`` GB10 notes, section (c).
"""

from __future__ import annotations

from dataclasses import dataclass

from latentforge.memory.plan import GIB, MemoryPlan, Term, largest
from latentforge.memory.shape import ModelShape
from latentforge.spec.sections import PipelineSpec, StudentSpec, TeacherSpec

TWIN = "F-DISTILL-SMOKE-002"
_RUNTIME = {"cpu": int(0.6 * GIB), "cuda": 3 * GIB}
"""The interpreter with torch and transformers; on CUDA also the context, workspaces and loaded kernels."""


@dataclass(frozen=True)
class _Bytes:
    """Bytes a unit of width that one layer keeps for the backward pass of one token."""

    hidden: float
    query: float
    kv: float
    intermediate: float


_SAVED = {"fp32": _Bytes(24, 20, 17, 16), "bf16": _Bytes(20, 10.5, 10.5, 8)}
_WIDTH = {"fp32": 4, "bf16": 2}


def activation_bytes(shape: ModelShape, tokens: int, precision: str = "fp32") -> int:
    """Bytes kept between forward and backward of the decoder for ``tokens`` tokens in flight, logits not counted."""
    unit = _SAVED[precision]
    layer = (
        unit.hidden * shape.hidden
        + unit.query * shape.query_width
        + unit.kv * shape.kv_width
        + unit.intermediate * shape.intermediate
    )
    return int(tokens * (shape.layers * layer + 3 * 4 * shape.hidden))


def attention_bytes(shape: ModelShape, rows: int, length: int) -> int:
    """Bytes of one layer's scores in fp32, kept twice (scores and softmax), for ``rows`` sequences of the length that
    is really used, never of the longest position that the model admits."""
    return 2 * 4 * rows * shape.heads * length * length


def kv_bytes(shape: ModelShape, tokens: int, width: int = 2) -> int:
    """Bytes of the keys and values that a serving teacher keeps for ``tokens`` tokens (``width`` bytes a number).

    A teacher in process answers whole rows and keeps none.
    """
    return 2 * shape.layers * shape.kv_width * width * tokens


def training_terms(
    shape: ModelShape, *, rows: int, length: int, precision: str, who: str, logit_copies: int
) -> list[Term]:
    """Weights, optimiser states, activations, logits, attention scratch.

    States: Adam's two moments and the gradients in fp32; beside bf16 weights also fp32 masters, and the gradients of
    one micro-batch before they are added to those in fp32.
    """
    count, width = shape.parameters, _WIDTH[precision]
    states = count * (8 + 4 + (4 + 2 if precision == "bf16" else 0))
    tokens = rows * length
    # One more layer's worth for the gradients of the activations that flow back while they are in use.
    working = activation_bytes(shape, tokens, precision) * (shape.layers + 1) // shape.layers
    return [
        Term(who, count * width),
        Term("states", states),
        Term("activations", working),
        Term("logits", logit_copies * 4 * tokens * shape.vocab_size),
        Term("attention", attention_bytes(shape, rows, length)),
    ]


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


def pipeline_memory(
    spec: PipelineSpec,
    *,
    device: str = "cpu",
    teacher: ModelShape | None = None,
    teacher_bytes: int | None = None,
    student: ModelShape | None = None,
) -> dict[str, MemoryPlan]:
    """The plan of each run of an effective pipeline, by kind, for ``device`` ``cpu`` or ``cuda``.

    ``teacher`` and ``student`` are the shapes of folders that the spec names (from their ``config.json``). Runs load
    both in fp32, whatever the folder keeps. Where a folder's shape is not given, the plans that need it say so in
    ``unknown``; ``teacher_bytes``, the size of its weights on disk, is then the least that it takes.
    """
    runtime = Term("runtime", _RUNTIME["cuda" if device == "cuda" else "cpu"])
    external = spec.teacher.model is not None
    vocab_size = teacher.vocab_size if external and teacher is not None else spec.data.vocab_size
    own = None if external else teacher_shape(spec.teacher, vocab_size)
    taught = teacher if external else own
    if spec.distill.student.init is None:
        student = student_shape(spec.distill.student, vocab_size)
    length = spec.data.sequence_length
    plans: dict[str, MemoryPlan] = {}
    if own is not None:
        # Cross-entropy of transformers holds the logits, their log-softmax and the gradient.
        terms = training_terms(
            own, rows=spec.teacher.batch_size, length=length, precision="fp32", who="teacher", logit_copies=3
        )
        plans["teacher"] = MemoryPlan("teacher", (*terms, runtime))
    missing = [] if taught is not None else ["the teacher"]
    weights = (teacher_bytes or 0) if taught is None else taught.parameters * 4
    if spec.distill.targets == "store":
        plans["score"] = MemoryPlan(
            "score", (*_inference(taught, weights, spec.score.batch_size, length, copies=3), runtime), tuple(missing)
        )
    distill = spec.distill
    rows = distill.micro_batch_size or distill.batch_size
    # With a store a full run never loads its teacher; a smoke run does, to show what it would have written.
    live = distill.targets != "store"
    beside = live or spec.profile == "smoke"
    terms = _inference(taught, weights, rows, length, copies=2 if live else 1) if beside else []
    if student is None:
        missing.append("the student")
    else:
        trained = training_terms(
            student, rows=rows, length=length, precision=distill.precision, who="student", logit_copies=2
        )
        terms += [*trained, Term("start", 4 * student.parameters)]  # what the student, and its twin, are copies of
        if TWIN in distill.require:
            terms.append(Term("twin", sum(term.bytes for term in trained if term.name in ("student", "states"))))
    plans["distill"] = MemoryPlan("distill", (*_joined(terms), runtime), tuple(missing))
    return plans


def pipeline_peak(
    spec: PipelineSpec,
    *,
    device: str = "cpu",
    teacher: ModelShape | None = None,
    teacher_bytes: int | None = None,
    student: ModelShape | None = None,
) -> MemoryPlan:
    """The largest plan of a pipeline, whose runs are made one after the other (arguments of ``pipeline_memory``)."""
    plans = pipeline_memory(spec, device=device, teacher=teacher, teacher_bytes=teacher_bytes, student=student)
    return largest(plans.values())


def _inference(shape: ModelShape | None, weights: int, rows: int, length: int, *, copies: int) -> list[Term]:
    """A teacher that answers: weights, one layer's activations, its logits, one layer's attention."""
    if shape is None:
        return [Term("teacher", weights)]
    return [
        Term("teacher", weights),
        Term("activations", activation_bytes(shape, rows * length) // shape.layers),
        Term("logits", copies * 4 * rows * length * shape.vocab_size),
        Term("attention", attention_bytes(shape, rows, length)),
    ]


_ORDER = ("teacher", "student", "start", "twin", "states", "activations", "logits", "attention", "runtime")


def _joined(terms: list[Term]) -> list[Term]:
    """Terms of one name added up, in the order in which a plan shows them."""
    names = sorted({term.name for term in terms}, key=_ORDER.index)
    return [Term(name, sum(term.bytes for term in terms if term.name == name)) for name in names]
