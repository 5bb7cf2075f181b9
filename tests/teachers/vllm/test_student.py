"""A student learns the same from a teacher's rows whoever computed them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from latentforge.data import ShardSet
from latentforge.students.causal import ModelShape, Student, new_model
from latentforge.targets.row import SequenceTargets
from latentforge.targets.store import TargetStore
from latentforge.teachers.store import StoreTeacher
from latentforge.train.engines.single import Single
from latentforge.train.loop import Objective, Trainer
from latentforge.train.optimiser import MasterOptimiser, Updates
from latentforge.train.setting import choose_kernel

from .conftest import K, Rows, all_rows

STEPS = 12


def _losses(path: Path, rows: Rows, data: ShardSet) -> list[float]:
    """The distillation losses of a new student, always the same, on the rows of a store that is filled with these."""
    identity = {"model": "tiny", "sha256": "0" * 64, "quantization": "float32", "tokenizer_sha256": "0" * 64}
    documents = all_rows(data)
    with TargetStore.create(path, identity, K, (1.0,), vocab_size=320) as store:
        assert store.put_many((documents[number], targets) for number, targets in rows.items()) == len(rows)
    shape = ModelShape(layers=1, hidden=32, heads=2, kv_heads=1, intermediate=64)
    model = new_model(shape, vocab_size=320, positions=data.sequence_length, eos_id=data.eos_id, seed=3)
    optimiser = MasterOptimiser(model, Updates(3e-3, 0.0, warmup_steps=0, steps=STEPS, clip_norm=1.0))
    kernel, _ = choose_kernel(torch.device("cpu"), torch.float32)
    student = Student(model, 320)
    trainer = Trainer(student, Single(student, optimiser), Objective(1.0, 0.0, 1.0, kernel))
    found = []
    with StoreTeacher.open(path) as teacher:
        for step in range(STEPS):
            batch = torch.from_numpy(data.train.rows(np.arange(16) + 16 * (step % 4)))
            found.append(trainer.step(step, batch, lambda tokens: teacher.targets(tokens, temperature=1.0)).loss)
    return found


def test_a_student_has_the_same_losses_on_the_rows_of_transformers_and_of_vllm(
    tmp_path: Path, served_data: ShardSet, hf_rows: Rows, http_rows: Rows
) -> None:
    here = _losses(tmp_path / "hf.sqlite", hf_rows, served_data)
    there = _losses(tmp_path / "vllm.sqlite", http_rows, served_data)
    worst = max(abs(one - other) for one, other in zip(here, there, strict=True))
    print(f"losses {here[0]:.4f} to {here[-1]:.4f}; on vLLM's rows they differ by at most {worst:.2g}")
    assert here[-1] < here[0]
    assert worst <= 1e-4

    # The planted control: rows that stand one position late teach something else.
    late = {
        number: SequenceTargets(
            np.roll(targets.ids, 1, axis=0),
            np.roll(targets.logprobs, 1, axis=0),
            {t: np.roll(tail, 1) for t, tail in targets.tails.items()},
        )
        for number, targets in hf_rows.items()
    }
    shifted = _losses(tmp_path / "late.sqlite", late, served_data)
    assert max(abs(one - other) for one, other in zip(here, shifted, strict=True)) > 1e-3
