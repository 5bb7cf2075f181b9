"""The recipe of each kind of run, and what every process of it sets first."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from latentforge.events import EventLog
from latentforge.spec.identity import Kind
from latentforge.spec.run import RunDir


def follow(run: RunDir, log: EventLog, kind: Kind) -> None:
    """Follow the recipe of ``kind``; the others are not imported."""
    if kind == "data":
        from latentforge.train.data import run as recipe
    elif kind == "teacher":
        from latentforge.train.teacher import run as recipe
    elif kind == "score":
        from latentforge.train.score import run as recipe
    elif kind == "autoencoder":
        from latentforge.train.autoencoder import run as recipe
    elif kind == "continuations":
        from latentforge.train.continuations import run as recipe
    elif kind == "latent":
        from latentforge.train.latent import run as recipe
    elif kind == "bench":
        from latentforge.train.bench import run as recipe
    else:
        from latentforge.train.distill import run as recipe
    recipe(run, log)


def set_up(seed: int) -> int:
    """Make torch deterministic and seed every generator; returns the seed as torch now holds it."""
    # Read by cuBLAS when its first handle is made; without it, its results differ from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # transformers loads DeepSpeed where it is installed, which would guess its device aloud.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # On a GPU some operators have no deterministic form: torch says which, and the run goes on.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    # Filling every fresh tensor with NaN is for finding bugs; results do not depend on it, the time does.
    torch.utils.deterministic.fill_uninitialized_memory = False
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return torch.initial_seed()
