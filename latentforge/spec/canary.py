"""The canary of a ``full`` pipeline: a few steps of the same training, through every gate, before the long run."""

from __future__ import annotations

from typing import Any

from latentforge.spec.canonical import canonical_sha256
from latentforge.spec.sections import DistillSpec

CANARY = "F-DISTILL-CANARY-001"
"""What a canary must pass, and no other run need: its early checkpoint, its moved tensors, its distance at step 0."""

STEPS = 8
CHECKPOINT_EVERY = 4


def canary_of(distill: DistillSpec) -> DistillSpec:
    """The same student, targets, batch and objective for a few steps, with a checkpoint in the middle of them."""
    return distill.model_copy(
        update={
            "steps": STEPS,
            # A long warm-up would leave the first steps with a learning rate too small to move every tensor.
            "warmup_steps": min(distill.warmup_steps, CHECKPOINT_EVERY),
            "checkpoint_every": CHECKPOINT_EVERY,
            "require": (CANARY,),
        }
    )


def canary_key(seed: int, distill: dict[str, Any]) -> str:
    """sha256 (hex) of the training that a canary stands for: its spec without steps, profile and checkpointing."""
    left_out = ("steps", "checkpoint_every")
    return canonical_sha256({"seed": seed, "distill": {k: v for k, v in distill.items() if k not in left_out}})
