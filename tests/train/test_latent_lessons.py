"""What a batch teaches a latent student: which continuations have their turn, what is counted, what makes its noise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from latentforge.data.order import BatchOrder
from latentforge.spec.latent import LatentSpec, LatentStudentSpec
from latentforge.students.latent.backbone import DecoderShape
from latentforge.students.latent.codec import CodecShape, new_codec
from latentforge.students.latent.energy import EnergySettings
from latentforge.students.latent.student import LatentShape, LatentStudent
from latentforge.targets.continuations import ContinuationStore
from latentforge.targets.continued import contexts
from latentforge.train.engines.single import Single
from latentforge.train.latent import training_cost
from latentforge.train.latent_lessons import Teaching, row_seeds
from latentforge.train.latent_trainer import LatentTrainer
from latentforge.train.optimiser import MasterOptimiser, Updates

V, K, EOS, COUNT = 40, 2, 0, 4


def text() -> Tensor:
    """Three rows of four chunks; a document ends in the second chunk of the first."""
    tokens = torch.randint(1, V, (3, 8), generator=torch.Generator().manual_seed(1))
    tokens[0, 2:4] = EOS
    return tokens


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ContinuationStore]:
    """At T = 1 the continuation number r of each context is [r + 1, r + 1], at 0.5 it is [r + 11, r + 11]."""
    made = {"chunk": K, "count": COUNT, "temperatures": (1.0, 0.5), "vocab_size": V, "eos_id": EOS, "seed": 1}
    with ContinuationStore.create(tmp_path / "c.sqlite", {"teacher": "fixed"}, **made) as found:
        for row in text().numpy():
            given = contexts(row, K, EOS)
            drawn = {}
            for temperature, first in ((1.0, 1), (0.5, 11)):
                ids = np.broadcast_to(first + np.arange(COUNT)[None, :, None], (3, COUNT, K)).astype(np.int32).copy()
                ids[~given] = -1
                drawn[temperature] = ids
            found.put(row, drawn)
        yield found


def teaching(store: ContinuationStore | None, *, covered: int | None = None, **fields: Any) -> Teaching:
    spec = LatentSpec(samples=4, **fields)
    codec = new_codec(CodecShape(V, K, 6, 8, 12), seed=1)
    return Teaching(spec, codec, eos_id=EOS, kernel="reference", rows=None, continued=store, covered=covered)


def test_continuations_have_their_turn_one_visit_after_the_other(store: ContinuationStore) -> None:
    taught = teaching(store, sample_weight=1.0, sample_continuations=2)
    visits = torch.tensor([0, 1, 2])
    assert taught.drawn(text(), visits=visits)["sample"].ids[:, 0, :, 0].tolist() == [[1, 2], [3, 4], [1, 2]]


def test_all_continuations_of_a_row_are_used_before_one_comes_again(store: ContinuationStore) -> None:
    taught, order = teaching(store, sample_weight=1.0, sample_continuations=1), BatchOrder(3, 2, 7)
    used: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(3 * COUNT):
        rows = order.indices(step)
        drawn = taught.drawn(text()[rows], visits=torch.from_numpy(order.visits(step)))["sample"]
        for row, ids in zip(rows.tolist(), drawn.ids[:, 0, 0, 0].tolist(), strict=True):
            used[row].append(ids)
    assert set(map(tuple, used.values())) == {(1, 2, 3, 4, 1, 2, 3, 4)}


def test_a_temperature_is_a_signal_of_its_own_and_they_share_the_weight(store: ContinuationStore) -> None:
    taught = teaching(store, sample_weight=1.0, tempered_weight=0.5)
    drawn = taught.drawn(text())
    assert {name: one.temperature for name, one in drawn.items()} == {"sample": 1.0, "tempered_0.5": 0.5}
    assert drawn["tempered_0.5"].ids[1, 0, :, 0].tolist() == [11, 12, 13, 14]
    assert taught.weights == {"text": 1.0, "sample": 1.0, "tempered_0.5": 0.5}
    lesson = taught.lesson(text(), row_seeds(1, 0, 3), drawn, taught.counts(text(), drawn))
    told = lesson.energy["tempered_0.5"].temperature
    assert told is not None
    assert told.unique().tolist() == [0.5]
    assert lesson.energy["sample"].temperature is None


def test_rows_that_were_not_continued_and_ends_of_documents_have_no_sample_and_are_counted_as_such(
    store: ContinuationStore,
) -> None:
    taught = teaching(store, sample_weight=1.0)
    drawn = taught.drawn(text(), covered=torch.tensor([True, False, True]))
    assert drawn["sample"].given.tolist() == [[True, False, True], [False] * 3, [True] * 3]
    counts = taught.counts(text(), drawn)
    assert counts.energy == {"text": 9, "sample": 5}
    # The second EOS of the first row is padding.
    assert (counts.tokens, counts.padding, counts.chunks) == (17, 1, 9)


def test_parts_of_a_batch_divide_by_the_whole_batch(store: ContinuationStore) -> None:
    taught = teaching(store, sample_weight=1.0)
    drawn = taught.drawn(text())
    counts = taught.counts(text(), drawn)
    parts = list(taught.lessons(text(), row_seeds(1, 0, 3), drawn, counts, 2))
    assert [len(part.chunks) for part in parts] == [2, 1]
    assert {part.energy["sample"].denominator for part in parts} == {counts.energy["sample"]}
    assert {part.tokens.denominator for part in parts if part.tokens is not None} == {counts.tokens}


def test_the_noise_of_a_row_is_that_of_its_seed_step_and_place() -> None:
    seeds = row_seeds(7, 3, 4)
    assert len(set(seeds.tolist())) == 4
    assert torch.equal(row_seeds(7, 3, 2), seeds[:2])
    assert not torch.equal(row_seeds(7, 4, 4), seeds)
    assert not torch.equal(row_seeds(8, 3, 4), seeds)


def test_rows_without_a_signal_of_their_own_teach_nothing_and_end_no_run(store: ContinuationStore) -> None:
    one = {"text_weight": 0.0, "token_ce_weight": 0.0, "sample_weight": 1.0}
    taught = teaching(store, student=LatentStudentSpec(token_layers=0), **one)
    shape = LatentShape(V, K, 6, DecoderShape(1, 8, 2, 1, 12), head_blocks=1, noise=4, token_layers=0)
    student = LatentStudent.new(shape, seed=1, energy=EnergySettings(1.0, 2, 4))
    optimiser = MasterOptimiser(student, Updates(1e-2, 0.1, warmup_steps=0, steps=2, clip_norm=1.0))
    before = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    trainer = LatentTrainer(student, Single(student, optimiser), taught, seed=1, micro_batch_size=1)
    done = trainer.step(0, text(), covered=torch.tensor([False] * 3))
    assert (done.counts.energy, done.result.loss, done.result.sequences) == ({"sample": 0}, 0.0, 3)
    assert all(torch.equal(before[name], weight) for name, weight in student.named_parameters())
    done = trainer.step(1, text(), covered=torch.tensor([False, True, False]))
    assert done.counts.energy == {"sample": 3}
    assert not torch.equal(before["table.weight"], student.table.weight)


def test_each_signal_is_counted_in_what_training_costs(store: ContinuationStore) -> None:
    width, noise, latent, codec, inner = 16, 5, 6, 8, 12
    shape = LatentShape(V, K, latent, DecoderShape(1, width, 2, 2, 24), head_blocks=1, noise=noise, token_layers=1)
    student = LatentStudent.new(shape, seed=1, energy=EnergySettings(1.0, 3, 4))

    def cost(**weights: float) -> tuple[float, float]:
        """Of a chunk: the head's operations, and the codec's."""
        found = training_cost(student, teaching(store, **weights), positions=4, rows=3)
        return found.head * K, found.codec * K

    # By hand: two operations a weight, three times where a weight is trained, twice for a gradient through frozen ones.
    block = 3 * codec * inner
    draw = 3 * 2 * (6 * width * width + 2 * width * width + (noise + latent) * width)
    encode = 2 * (K * (block + codec * codec) + block + 2 * codec * latent)
    decode = 2 * 2 * (latent * codec + block + K * (codec * codec + block + codec * V))
    assert cost() == (3 * draw, encode)
    assert cost(sample_weight=1.0) == (6 * draw, (1 + COUNT) * encode)
    assert cost(text_weight=0.0, sample_weight=1.0) == (3 * draw, COUNT * encode)
    assert cost(mse_weight=0.5) == (4 * draw, 2 * encode)
    assert cost(text_weight=0.0, ce_weight=0.5) == (draw, encode + decode)
    assert cost(mse_weight=0.5, ce_weight=0.5, kl_weight=0.5) == (4 * draw, 2 * encode + decode)
