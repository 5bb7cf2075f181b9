"""Closed-form memory of the runs of a latent student: its own, and that in which a teacher goes on with the text."""

from __future__ import annotations

from latentforge.memory.activations import activation_bytes, attention_bytes
from latentforge.memory.codec import LOGIT_ROWS, codec_parameters
from latentforge.memory.plan import MemoryPlan, Term, checkpoint_term, runtime
from latentforge.memory.shape import ModelShape
from latentforge.memory.spread import Held, Numbers, Spread, whole_terms
from latentforge.spec.latent import AutoencoderSpec, ContinuationsSpec, LatentSpec

_CODED = 8
"""Copies of a chunk's K embedded tokens that the codec holds while it encodes without a gradient."""


def latent_parameters(spec: LatentSpec, *, chunk: int, latent: int, vocab_size: int) -> int:
    """The parameters of a latent student: table, backbone over chunks, energy head and token head."""
    student, width = spec.student, spec.student.hidden
    linear, norm = (width + 1) * width, 2 * width
    compress = (chunk * width + 1) * 2 * width + (2 * width + 1) * width + norm
    block = norm + (2 * width + 1) * width + linear + 2 * linear + linear
    head = (student.noise + 1) * width + norm + linear + norm + student.head_blocks * block
    head += norm + linear + (width + 1) * latent + (width if spec.tempered_weight > 0 else 0)
    tokens = width + linear + norm + _decoder(spec, student.token_layers) if student.token_layers else 0
    return vocab_size * width + compress + _decoder(spec, student.layers) + head + tokens


def latent_memory(
    spec: LatentSpec,
    codec: AutoencoderSpec,
    *,
    chunk: int,
    length: int,
    vocab_size: int,
    device: str,
    continuations: ContinuationsSpec | None,
    hosts: int = 1,
    leads: bool = True,
) -> MemoryPlan:
    """The plan of a run that trains a latent student on rows of ``length`` tokens beside a frozen codec.

    ``continuations`` are what its sampled signals are made of (None: there are none). It is the plan of one of
    ``hosts``, of which the first ``leads``.
    """
    spread = Spread.of(spec.distributed, spec.processes, hosts)
    rows = spread.rows(spec.batch_size, spec.micro_batch_size)
    drawn = 0 if continuations is None else spec.sample_continuations or continuations.count
    signals = _energy_signals(spec, continuations)
    chunks, tokens = rows * length // chunk, rows * length
    count = latent_parameters(spec, chunk=chunk, latent=codec.latent, vocab_size=vocab_size)
    frozen = codec_parameters(codec, chunk=chunk, vocab_size=vocab_size)
    encoded = chunks * max(1, drawn) * chunk * codec.width * 4 * _CODED
    shape = _shape(spec, spec.student.layers)
    stacked = (spec.student.layers + spec.student.token_layers) * shape.layer_parameters
    numbers = Numbers(count, shape.layer_parameters, count - stacked)
    kept = latent_activation_bytes(spec, chunk=chunk, chunks=chunks, signals=signals)
    flowing, scored = _in_flight(spec, chunk=chunk, chunks=chunks, latent=codec.latent)
    accumulates = rows < spread.rows(spec.batch_size, None)
    held = Held.of(spread, numbers, spec.precision, accumulates=accumulates, device=device)
    logits = 2 * 4 * min(tokens, LOGIT_ROWS) * vocab_size
    # What the codec encodes is let go before the student begins.
    terms = held.passing("student", kept=max(kept + flowing, encoded), layer=flowing, logits=logits)
    passing = [
        *(term for term in terms if term.name in ("activations", "logits")),
        Term("energy", signals * energy_bytes(spec, codec.latent, chunks) + scored),
        Term("attention", 0 if device == "cpu" else attention_bytes(shape, rows, length // chunk)),
    ]
    saved_last = spec.checkpoint_every >= spec.steps
    return MemoryPlan(
        "latent",
        (
            *(term for term in terms if term.name not in ("activations", "logits")),
            *whole_terms(spread, 4 * count),
            Term("codec", 4 * frozen),
            checkpoint_term(count, room=sum(t.bytes for t in passing) if saved_last else 0),
            *passing,
            runtime(device),
        ),
    ).on(spec.processes, first=leads)


def continuation_bytes(spec: ContinuationsSpec, *, length: int, rows: int) -> int:
    """The most that the store of ``rows`` rows of ``length`` tokens takes on disk, before it is packed."""
    return 4 * rows * length * spec.count * len(spec.temperatures) + 4096 * (rows // 64 + 1)


def _energy_signals(spec: LatentSpec, continuations: ContinuationsSpec | None) -> int:
    """How often the head is drawn from for each chunk: once a signal, of which each temperature is one."""
    below = 0 if continuations is None else sum(one < 1.0 for one in continuations.temperatures)
    return max(1, (spec.text_weight > 0) + (spec.sample_weight > 0) + (below if spec.tempered_weight > 0 else 0))


def latent_activation_bytes(spec: LatentSpec, *, chunk: int, chunks: int, signals: int) -> int:
    """Bytes kept between forward and backward for ``chunks`` chunks in flight, of which the head is drawn from
    ``signals`` times each; logits and energy scores not counted."""
    student, width, tokens = spec.student, spec.student.hidden, chunks * chunk
    number, again = 2 if spec.precision == "bf16" else 4, spec.activation_checkpointing
    layers = activation_bytes(_shape(spec, student.layers), chunks, spec.precision, recomputed=again)
    if student.token_layers:
        layers += activation_bytes(_shape(spec, student.token_layers), tokens, spec.precision, recomputed=again)
        layers += number * tokens * width * 3
    # A block keeps its input and ten tensors between its products; the context of a state is that of all its draws.
    draw = student.noise + width * (5 + (1 if again else 11) * student.head_blocks)
    drawn = signals * chunks * (spec.draws * draw + 2 * width)
    return layers + number * (drawn + chunks * width * (chunk + 8))


def energy_bytes(spec: LatentSpec, latent: int, chunks: int) -> int:
    """Bytes that the energy score of one signal keeps: points about their middle, and the slopes of their distances."""
    return 4 * chunks * ((spec.samples + 3 * spec.draws) * latent + spec.draws * (spec.draws + spec.samples))


def _in_flight(spec: LatentSpec, *, chunk: int, chunks: int, latent: int) -> tuple[int, int]:
    """What comes on top where a pass turns back: a layer's or a block's gradients and what it computes again, and
    samples and distances of one signal's energy score while it is computed."""
    number, width = 2 if spec.precision == "bf16" else 4, spec.student.hidden
    layer = activation_bytes(_shape(spec, 1), chunks * (chunk if spec.student.token_layers else 1), spec.precision)
    block = number * chunks * spec.draws * width * 11
    pairs = spec.draws * (spec.draws + spec.samples)
    return max(layer, block), 4 * chunks * (spec.samples * latent + 4 * pairs)


def _decoder(spec: LatentSpec, layers: int) -> int:
    shape = _shape(spec, layers)
    return layers * shape.layer_parameters + shape.hidden


def _shape(spec: LatentSpec, layers: int) -> ModelShape:
    student = spec.student
    return ModelShape.qwen3(
        1,
        layers=layers,
        hidden=student.hidden,
        heads=student.heads,
        kv_heads=student.kv_heads,
        intermediate=student.intermediate,
    )
