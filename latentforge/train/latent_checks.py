"""Executable checks of what latent students claim; the contract ``latent`` names these functions and plants faults."""

from __future__ import annotations

import numpy as np
import torch

from latentforge.contracts.finding import Finding
from latentforge.data.shards import ShardSet
from latentforge.students.latent.causality import changes
from latentforge.students.latent.chunks import chunked, valid
from latentforge.students.latent.student import LatentStudent
from latentforge.train.canary_falsifiers import latent_canary_001
from latentforge.train.checks import finding_of
from latentforge.train.latent_falsifiers import latent_kd_001
from latentforge.train.rehearsal import tiny_latent_events, tiny_latent_run


def nothing_before_a_chunk_changes(*, mutant: str | None = None) -> Finding:
    """On the trained student of ``tiny-latent``. ``mutant`` "sees_ahead" takes the mask from its layers."""
    run = tiny_latent_run()
    student, data = LatentStudent.open(run.out / "student"), ShardSet.open(run.input_path("data"))
    if mutant == "sees_ahead":
        for layer in student.backbone.decoder.model.layers:
            layer.self_attn.is_causal = False
    chunks = chunked(torch.from_numpy(data.heldout.rows(np.arange(4))), data.chunk)
    found = changes(student, chunks, valid(chunks, data.eos_id))
    text = (
        f"another chunk at {found.places} places changes what comes before by {found.before:.3g}, what follows by "
        f"{found.after:.3g}"
    )
    return Finding(found.before == 0.0 and found.after > 0.0, text, {"before": found.before, "after": found.after})


def each_signal_lowers_its_own_loss(*, mutant: str | None = None) -> Finding:
    """In the run of ``tiny-latent``. ``mutant`` "frozen" trains nothing."""
    return finding_of(latent_kd_001(tiny_latent_events(frozen=mutant == "frozen")))


def canary_gates_hold(*, mutant: str | None = None) -> Finding:
    """In the run of ``tiny-latent``: an early checkpoint is whole, all of it moved, and each signal has something to
    teach before step 1. ``mutant`` "frozen" trains nothing.
    """
    return finding_of(latent_canary_001(tiny_latent_events(frozen=mutant == "frozen")))
