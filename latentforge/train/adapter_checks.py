"""Executable checks of what adapters promise; contracts name these functions and plant their faults."""

from __future__ import annotations

from latentforge.contracts.finding import Finding
from latentforge.students.adapters import Lora, adapt, adapters, trained_part
from latentforge.students.causal import ModelShape, Student, new_model
from latentforge.train.engines.single import Single
from latentforge.train.loop import Objective, Trainer
from latentforge.train.optimiser import MasterOptimiser, Updates
from latentforge.train.products import frozen_digests, start_digests
from latentforge.train.rehearsal import LENGTH, VOCABULARY, fixture_targets, small_batch


def frozen_tensors_stay(*, mutant: str | None = None) -> Finding:
    """Three steps of a small adapted student move its adapters and nothing else; ``mutant`` "unfrozen" trains one of
    its own weights beside them."""
    model = new_model(ModelShape(1, 32, 2, 1, 64), vocab_size=VOCABULARY, positions=LENGTH, eos_id=0, seed=3)
    adapt(model, Lora(4, 8.0, 0.0, ("q_proj", "down_proj")), seed=3)
    if mutant == "unfrozen":
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    updates = Updates(1e-2, weight_decay=0.0, warmup_steps=0, steps=9, clip_norm=None)
    student, optimiser = Student(model, VOCABULARY), MasterOptimiser(trained_part(model), updates)
    trainer = Trainer(student, Single(student, optimiser), Objective(1.0, 0.0, 1.0, "reference"))
    before, start = frozen_digests(model), start_digests(optimiser)
    for step in range(3):
        trainer.step(step, small_batch(), fixture_targets())
    changed = [name for name, digest in frozen_digests(model).items() if digest != before[name]]
    now = start_digests(optimiser)
    moved = sum(now[name] != start[name] for name, _ in adapters(model))
    count = sum(1 for _ in adapters(model))
    text = f"{len(before) - len(changed)} of {len(before)} frozen tensors stayed, {moved} of {count} adapters moved"
    return Finding(not changed and moved == count > 0, text, {"changed": changed, "moved": moved})
