"""One step trains every row of its batch, once, or is refused."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from latentforge.errors import FailedError, RefusedError
from latentforge.kernels.targets import DenseTargets
from latentforge.students.causal import IGNORE, LossParts
from latentforge.train import teacher as recipe
from latentforge.train.arrival_checks import objective_arrives
from latentforge.train.engines.world import World
from latentforge.train.loop import evaluate, rehearse
from latentforge.train.optimiser import DECAY_TO, MasterOptimiser, Updates, warmup_cosine
from latentforge.train.rehearsal import LENGTH, SEQUENCES, fixture_targets, small_batch, small_trainer


def weights(trainer: Any) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in trainer.optimiser.masters.values()])


@pytest.mark.parametrize("micro", [1, 5, 16])
def test_a_split_batch_gives_the_update_of_the_whole_one(micro: int) -> None:
    whole, split = small_trainer(ce_weight=0.3, kd_weight=0.7), small_trainer(ce_weight=0.3, micro_batch_size=micro)
    split.objective = whole.objective
    a = whole.step(0, small_batch(), fixture_targets())
    b = split.step(0, small_batch(), fixture_targets())
    assert a.loss == pytest.approx(b.loss, rel=1e-5)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
    assert sum(b.micro_batches) == b.sequences == SEQUENCES
    assert b.rows == b.denominator == SEQUENCES * (LENGTH - 1)


def test_a_student_that_trains_a_part_of_the_batch_is_refused_and_nothing_moves() -> None:
    trainer = small_trainer()
    forward = trainer.student.forward

    def last(tokens: Tensor, targets: Any, denominator: float, **settings: Any) -> LossParts:
        return forward(tokens[-1:], fixture_targets()(tokens[-1:]), denominator, **settings)

    trainer.student.forward = last  # type: ignore[method-assign]
    before = weights(trainer)
    with pytest.raises(FailedError, match=f"{LENGTH - 1} of {SEQUENCES * (LENGTH - 1)} rows were trained"):
        trainer.step(0, small_batch(), fixture_targets())
    assert torch.equal(before, weights(trainer))


@pytest.mark.parametrize(("mutant", "passed"), [(None, True), ("temperature", False), ("swapped", False)])
def test_a_step_descends_the_objective_that_was_asked(mutant: str | None, passed: bool) -> None:
    assert objective_arrives(mutant=mutant).passed is passed


def test_targets_of_other_rows_are_refused() -> None:
    trainer = small_trainer()
    other = fixture_targets()(small_batch()[:3])
    with pytest.raises(RefusedError, match="teacher logits have shape"):
        trainer.step(0, small_batch(), lambda tokens: other)


def test_a_loss_that_is_not_a_number_ends_the_run_before_the_update() -> None:
    trainer = small_trainer()
    rows = SEQUENCES * (LENGTH - 1)
    before = weights(trainer)
    with pytest.raises(FailedError, match=r"loss is nan at step 5; nothing was updated"):
        trainer.step(4, small_batch(), lambda tokens: DenseTargets(torch.full((rows, 64), math.nan)))
    assert torch.equal(before, weights(trainer))


def test_the_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    schedule = warmup_cosine(4, 20)
    values = [schedule(step) for step in range(20)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert values[-1] == pytest.approx(DECAY_TO)
    assert values[4:] == sorted(values[4:], reverse=True)


def test_the_reported_learning_rate_is_the_optimisers_own() -> None:
    trainer = small_trainer(learning_rate=1e-3, warmup_steps=1)
    assert trainer.step(0, small_batch(), fixture_targets()).learning_rate == pytest.approx(5e-4)
    trainer.optimiser.groups[0]["initial_lr"] = 7e-3
    assert trainer.step(1, small_batch(), fixture_targets()).learning_rate == pytest.approx(7e-3)


def test_ignored_labels_are_not_counted() -> None:
    trainer = small_trainer()
    tokens = small_batch()
    seen: list[float] = []
    forward = trainer.student.forward

    def spy(part: Tensor, targets: Any, denominator: float, **settings: Any) -> LossParts:
        seen.append(denominator)
        return LossParts(*forward(part, targets, denominator, **settings)[:3], rows=int(denominator))

    trainer.student.forward = spy  # type: ignore[method-assign]
    trainer.step(0, tokens, fixture_targets())
    assert seen == [SEQUENCES * (LENGTH - 1)]
    assert IGNORE == -100


def test_bf16_accumulates_in_fp32_masters_that_finer_updates_reach() -> None:
    trainer = small_trainer(precision=torch.bfloat16, learning_rate=1e-6)
    masters = {name: value.detach().clone() for name, value in trainer.optimiser.masters.items()}
    for step in range(4):
        trainer.step(step, small_batch(), fixture_targets())
    assert all(value.dtype == torch.float32 for value in trainer.optimiser.masters.values())
    assert all(value.dtype == torch.bfloat16 for value in trainer.student.model.parameters())
    # 4e-6 is far below what bf16 resolves near 1, where the norms start: only the masters can have moved.
    name = "model.norm.weight"
    assert not torch.equal(masters[name], trainer.optimiser.masters[name])
    assert torch.equal(trainer.optimiser.working[name], torch.ones_like(trainer.optimiser.working[name]))


def test_evaluation_is_the_mean_over_all_rows_and_changes_nothing() -> None:
    trainer = small_trainer()
    batch = small_batch()
    before = weights(trainer)
    whole = evaluate(trainer.student, [batch], fixture_targets(), temperature=1.0, backend="auto")
    parts = evaluate(trainer.student, batch.split(5), fixture_targets(), temperature=1.0, backend="auto")
    assert whole.rows == parts.rows == SEQUENCES * (LENGTH - 1)
    assert whole.loss == pytest.approx(parts.loss, rel=1e-5)
    assert whole.kl == pytest.approx(parts.kl, rel=1e-5)
    logits = trainer.student.logits(batch).detach()
    wanted = torch.nn.functional.cross_entropy(logits, batch[:, 1:].reshape(-1))
    assert whole.loss == pytest.approx(float(wanted), rel=1e-5)
    assert torch.equal(before, weights(trainer))


def test_evaluated_kl_has_no_temperature_squared() -> None:
    student, batch, targets = small_trainer().student, small_batch(), fixture_targets()
    found = evaluate(student, [batch], targets, temperature=2.0, backend="auto").kl
    p = torch.log_softmax(targets(batch).logits / 2.0, -1)  # type: ignore[union-attr]
    q = torch.log_softmax(student.logits(batch).detach() / 2.0, -1)
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_a_rehearsal_changes_nothing() -> None:
    def trained(rehearsed: bool) -> tuple[list[float], list[torch.Tensor], torch.Tensor]:
        torch.manual_seed(4)
        trainer = small_trainer(micro_batch_size=5, ce_weight=0.3, kd_weight=0.7, precision=torch.bfloat16)
        if rehearsed:
            rehearse(trainer, small_batch(), fixture_targets())
            assert all(p.grad is None for p in trainer.student.parameters())
            assert trainer.optimiser.moments() == {}
        losses = [trainer.step(step, small_batch(), fixture_targets()).loss for step in range(2)]
        return losses, list(trainer.optimiser.masters.values()), torch.get_rng_state()

    plain, after = trained(False), trained(True)
    assert plain[0] == after[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], after[1], strict=True))
    assert torch.equal(plain[2], after[2])


def test_a_parameter_that_had_no_gradient_yet_is_put_back_without_moments() -> None:
    def made() -> tuple[torch.nn.ModuleDict, MasterOptimiser]:
        torch.manual_seed(1)
        model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 2) for name in ("used", "later")})
        return model, MasterOptimiser(model, Updates(1e-2, 0.1, warmup_steps=0, steps=4, clip_norm=1.0))

    def train(model: torch.nn.ModuleDict, optimiser: MasterOptimiser, *names: str) -> None:
        sum(model[name](torch.ones(3)).square().sum() for name in names).backward()
        optimiser.collect()
        optimiser.step()

    whole, first = made()
    train(whole, first, "used")
    masters = {name: tensor.detach().clone() for name, tensor in first.masters.items()}
    moments = {name: tensor.clone() for name, tensor in first.moments().items()}
    resumed, second = made()
    second.load(masters, moments)
    for model, optimiser in ((whole, first), (resumed, second)):
        train(model, optimiser, "used", "later")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_held_out_pass_of_the_small_teacher_has_no_more_rows_than_a_training_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Rows:
        def __len__(self) -> int:
            return 12

        def rows(self, numbers: Any) -> Any:
            return torch.zeros(len(numbers), 4, dtype=torch.int64).numpy()

    seen: list[int] = []
    monkeypatch.setattr(recipe, "evaluate", lambda model, batches, *_, **__: seen.extend(map(len, batches)))
    log: Any = SimpleNamespace(phase=lambda name: nullcontext())
    data: Any = SimpleNamespace(heldout=Rows())
    model: Any = torch.nn.Linear(1, 1)
    recipe.evaluated(log, model, data, "cpu", 5)
    assert seen == [5, 5, 2]
    # Several processes: the rows of the largest share, or those that are asked for.
    assert [World(0, size).rows(12, micro) for size, micro in ((1, None), (5, None), (5, 2), (5, 4))] == [12, 3, 2, 3]
