"""Closed-form memory of one optimiser step of a decoder: what is there all the time, and what only at its peak."""

from __future__ import annotations

from dataclasses import dataclass, replace

from latentforge.memory.activations import activation_bytes, attention_bytes
from latentforge.memory.plan import Term, checkpoint_term
from latentforge.memory.shape import ModelShape
from latentforge.memory.spread import ALONE, WIDTH, Held, Numbers, Spread
from latentforge.spec.lora import LoraSpec


@dataclass(frozen=True)
class Step:
    """How a decoder is trained, as far as its memory goes: ``rows`` of ``length`` tokens a pass.

    ``accumulates`` says that gradients are there while a pass runs forward: those of the passes before it.
    ``recomputed``: activations inside the layers are computed again for the gradient. ``adapters``: the parameters that
    are trained where all others are frozen (LoRA); None: all are trained. ``spread``: over which processes.
    ``saved_last``: no checkpoint is written before the last step.
    """

    rows: int
    length: int
    precision: str = "fp32"
    accumulates: bool = True
    recomputed: bool = False
    adapters: int | None = None
    spread: Spread = ALONE
    saved_last: bool = False


def adapter_parameters(shape: ModelShape, lora: LoraSpec) -> int | None:
    """The numbers of a spec's adapters on a decoder of ``shape``; None where a module is named that is not counted."""
    hidden, query, kv, inner = shape.hidden, shape.query_width, shape.kv_width, shape.intermediate
    sizes = {
        "q_proj": (hidden, query),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (query, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    if not set(lora.target_modules) <= sizes.keys():
        return None
    return shape.layers * lora.rank * sum(sum(sizes[name]) for name in lora.target_modules)


def training_terms(shape: ModelShape, step: Step, *, who: str, device: str) -> list[Term]:
    """The terms of one process: weights, optimiser states, a checkpoint on its way to the disk, what the engine has
    beside them, activations, logits, attention scratch.

    States: Adam's two moments and the gradients in fp32; beside bf16 weights also fp32 masters, and the gradients of
    one micro-batch before they are added to those in fp32. Activations: what the step holds beyond these at its peak.
    That is where the pass turns back, with all that it kept, or at its end, with all gradients and one layer's
    activations: gradients that are not there yet leave their room to the activations.
    """
    width, tokens = WIDTH[step.precision], step.rows * step.length
    trained = shape.parameters if step.adapters is None else step.adapters
    outside = shape.parameters - shape.layers * shape.layer_parameters
    held = Held.of(
        step.spread,
        Numbers(trained, shape.layer_parameters, outside),
        step.precision,
        accumulates=step.accumulates,
        device=device,
    )
    # The loss writes its gradient over them.
    logits = width * tokens * shape.vocab_size
    # The head's gradient is made before anything is let go.
    head = width * shape.vocab_size * shape.hidden if step.adapters is None else 0
    kept = activation_bytes(shape, tokens, step.precision, recomputed=step.recomputed)
    # One layer's, and some more for the gradients that flow back through it while it is let go.
    layer = activation_bytes(shape, tokens, step.precision) * 5 // (4 * shape.layers)
    weights, states, *passing = held.passing(who, kept=kept + head, layer=layer, logits=logits)
    if step.adapters is not None:
        weights = replace(weights, bytes=weights.bytes + width * shape.parameters)
    # torch computes attention on a CPU without its scores; elsewhere that depends on the device's kernels.
    attention = Term("attention", 0 if device == "cpu" else attention_bytes(shape, step.rows, step.length))
    room = sum(term.bytes for term in (*passing, attention)) if step.saved_last else 0
    return [weights, states, checkpoint_term(trained, room=room), *passing, attention]
