"""The canaries of a ``full`` pipeline: a few steps of the same training, through every gate, before each long run."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from latentforge.spec.canonical import canonical_sha256
from latentforge.spec.latent import LatentSpec
from latentforge.spec.sections import DistillSpec

Trained = Literal["distill", "latent"]
"""The kinds of runs that take hours, and start after a canary alone."""
Asked = TypeVar("Asked", DistillSpec, LatentSpec)

CANARY = "F-DISTILL-CANARY-001"
LATENT_CANARY = "F-LATENT-CANARY-001"
REQUIRED: dict[Trained, tuple[str, ...]] = {
    "distill": (CANARY,),
    # A student that sees what it is to predict shows it after a few steps as after all of them.
    "latent": (LATENT_CANARY, "F-LATENT-CAUSAL-001"),
}
"""What a canary of each kind must pass beside what every run is judged by."""

STEPS = 8
CHECKPOINT_EVERY = 4
_ITS_OWN: dict[str, Any] = {
    "steps": STEPS,
    "checkpoint_every": CHECKPOINT_EVERY,
    "validate_every": None,
    "keep": "last",
    "beside": False,
}
"""What a canary is asked for whatever the long run is: how long, what is kept and measured on the way, and who is
trained beside it."""


def canary_of(kind: Trained, asked: Asked) -> Asked:
    """The same student, signals, batches and objective for a few steps, with a checkpoint in the middle of them."""
    # A long warm-up would leave the first steps with a learning rate too small to move every tensor.
    own = {"warmup_steps": min(asked.warmup_steps, CHECKPOINT_EVERY), "require": REQUIRED[kind]}
    own |= {name: value for name, value in _ITS_OWN.items() if name in type(asked).model_fields}
    return asked.model_copy(update=own)


def canary_key(kind: Trained, seed: int, asked: dict[str, Any]) -> str:
    """sha256 (hex) of the training that a canary stands for: its section ``asked`` without what is a canary's own."""
    return canonical_sha256({"seed": seed, kind: {k: v for k, v in asked.items() if k not in _ITS_OWN}})
