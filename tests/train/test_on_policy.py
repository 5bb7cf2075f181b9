"""A share of the batches is the student's own text, judged by the teacher, the same whenever it is drawn again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from latentforge.events import read_events
from latentforge.kernels.targets import DenseTargets, topk_targets
from latentforge.spec.run import RunDir
from latentforge.students.causal import RowUse
from latentforge.teachers.fixture import FixtureTeacher
from latentforge.train.feed import Feed
from latentforge.train.onpolicy import OnPolicy, written_fields
from latentforge.train.rehearsal import LENGTH, SEQUENCES, VOCABULARY, fixture_targets, small_batch, small_trainer
from latentforge.train.supply_checks import Elsewhere, supply_of
from latentforge.verdicts import ExitCode

MakeRun = Callable[..., RunDir]
RunHere = Callable[[RunDir], tuple[ExitCode, str]]
BOTH = ("F-DISTILL-SMOKE-001", "F-DISTILL-SMOKE-002")
OWN = {"on_policy": 0.5, "on_policy_tokens": 8}


def steps(run: RunDir, model: str = "student") -> list[dict[str, Any]]:
    return [e.fields for e in read_events(run.events_file) if e.kind == "step" and e.fields["model"] == model]


def story(run: RunDir, model: str = "student") -> list[tuple[Any, ...]]:
    return [(s["step"], s["loss"], s["batch_sha256"], s.get("on_policy_sha256")) for s in steps(run, model)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.99, 1.0])
def test_over_all_steps_the_share_is_the_one_that_was_asked(share: float) -> None:
    own = OnPolicy(share, 8, 1.0, seed=7)
    counts = [own.count(step, 16) for step in range(300)]
    assert sum(counts) == int(share * 16 * 300 + 1e-6)
    assert max(counts) - min(counts) <= 1


def test_what_the_student_writes_depends_on_weights_seed_step_and_place_alone() -> None:
    student, tokens = small_trainer().student, small_batch()
    own = OnPolicy(0.5, 5, 1.0, seed=7)
    text = own.write(student, tokens, step=3, first=0)
    before = torch.get_rng_state()
    torch.rand(3)
    assert torch.equal(own.write(student, tokens[2:6], step=3, first=2), text[2:6])
    torch.set_rng_state(before)
    assert torch.equal(text[:, :-5], tokens[:, :-5])
    assert not torch.equal(text, own.write(student, tokens, step=4, first=0))
    assert not torch.equal(text, OnPolicy(0.5, 5, 1.0, seed=8).write(student, tokens, step=3, first=0))
    other = small_trainer()
    other.step(0, tokens, fixture_targets())
    assert not torch.equal(text, own.write(other.student, tokens, step=3, first=0))


def test_what_is_drawn_has_the_probabilities_of_the_student() -> None:
    student, beginning = small_trainer().student, small_batch()[:1, :6]
    with torch.no_grad():
        wanted = (student.logits(torch.cat([beginning, beginning[:, :1]], 1))[-1] / 0.5).softmax(-1)
    seeds = torch.arange(20_000)
    drawn = student.sample(beginning.expand(len(seeds), -1), 1, temperature=0.5, seeds=seeds)[:, -1]
    found = torch.bincount(drawn, minlength=VOCABULARY) / len(seeds)
    assert float((found - wanted).abs().max()) < 5 * float((wanted * (1 - wanted) / len(seeds)).sqrt().max())


def test_an_event_says_how_long_the_students_texts_were() -> None:
    text = torch.tensor([[9, 9, 5, 0, 5, 0], [9, 9, 5, 5, 5, 5], [9, 9, 0, 5, 5, 5]])
    said = written_fields(text, 4, eos_id=0)
    assert {name: said[f"on_policy_{name}"] for name in ("tokens", "length_min", "length_max")} == {
        "tokens": 12,
        "length_min": 1,
        "length_max": 4,
    }
    assert said["on_policy_length_mean"] == pytest.approx(7 / 3, abs=1e-3)


@pytest.mark.parametrize("dense", [True, False])
def test_a_row_is_trained_on_what_it_is_for_and_on_nothing_else(dense: bool) -> None:
    """Against torch: labels with targets, labels alone, targets alone, in one batch with one denominator."""
    trainer, tokens = small_trainer(), small_batch()[:4]
    teacher = FixtureTeacher(VOCABULARY).logits(tokens)
    rows = len(teacher)
    kind = torch.arange(rows) % 3
    use = RowUse(labelled=kind != 2, taught=kind != 1, ce_alone=1.5)
    targets = DenseTargets(teacher[use.taught]) if dense else topk_targets(teacher[use.taught], VOCABULARY, 2.0)
    settings: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.3, "kd_weight": 0.7}
    parts = trainer.student(tokens, targets, 50.0, **settings, use=use)
    parts.loss.backward()
    found = torch.cat([p.grad.reshape(-1) for p in trainer.student.parameters() if p.grad is not None])

    other = small_trainer()
    logits, labels = other.student.logits(tokens), tokens[:, 1:].reshape(-1)
    ce = F.cross_entropy(logits, labels, reduction="none")
    p, q = (teacher / 2).log_softmax(-1), (logits / 2).log_softmax(-1)
    kd = 4.0 * (p.exp() * (p - q)).sum(-1)
    zero = torch.zeros(())
    weight_ce = torch.where(kind == 0, 0.3, torch.where(kind == 1, 1.5, zero))
    loss = ((weight_ce * ce).sum() + 0.7 * kd[use.taught].sum()) / 50.0
    loss.backward()
    wanted = torch.cat([p.grad.reshape(-1) for p in other.student.parameters() if p.grad is not None])
    assert parts.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert (parts.rows, parts.ce_rows, parts.kd_rows) == (rows, int(use.labelled.sum()), int(use.taught.sum()))
    assert float(parts.ce) == pytest.approx(float(ce[use.labelled].sum()) / 50.0, rel=1e-5)
    assert float(parts.kd) == pytest.approx(float(kd[use.taught].sum()) / 50.0, rel=1e-5)


def test_half_of_the_prefixes_are_the_students_and_the_twin_sees_none_of_it(
    make_run: MakeRun, run_here: RunHere
) -> None:
    plain = make_run(steps=8, targets="live", require=BOTH)
    own = make_run(steps=8, targets="live", require=BOTH, micro_batch_size=5, **OWN)
    for run in (plain, own):
        code, text = run_here(run)
        assert code in (0, 1), text
    assert "on-policy share 50.0 %: 512 tokens were the student's own" in text
    assert "KD coverage 100.0 %" in text
    for step in steps(own):
        assert (step["on_policy_sequences"], step["on_policy_tokens"]) == (8, 64)
        assert step["rows"] == step["kd_rows"] == SEQUENCES * 31
        assert 1 <= step["on_policy_length_min"] <= step["on_policy_length_mean"] <= step["on_policy_length_max"] <= 8
    assert [s["batch_sha256"] for s in steps(own)] == [s["batch_sha256"] for s in steps(plain)]
    assert [s["loss"] for s in steps(own)] != [s["loss"] for s in steps(plain)]
    assert not any("on_policy_sequences" in s for s in steps(own, "twin"))
    losses = [s["loss"] for s in steps(plain, "twin")]
    assert [s["loss"] for s in steps(own, "twin")] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("targets", ["store", "live"])
def test_a_resumed_run_writes_the_same_text_and_has_the_same_losses(
    make_run: MakeRun, run_here: RunHere, targets: str
) -> None:
    whole = make_run(steps=8, targets=targets, **OWN)
    code, text = run_here(whole)
    assert code in (0, 1), text
    newest = whole.checkpoints / "step-000008"
    (newest / "state.json").unlink()
    again = make_run(attempt=2, predecessor=whole, steps=8, targets=targets, **OWN)
    _, text = run_here(again)
    assert "student resumes from step 4" in text
    assert "on-policy share 50.0 %: 512 tokens" in text
    assert story(again) == story(whole)
    assert all(s["on_policy_sha256"] for s in steps(again))


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"on_policy_tokens": 32}, r"on_policy_tokens = 32 leaves no beginning of a row of 32 tokens"),
        ({"on_policy_tokens": 8, "kd_weight": 0.0}, r"the student's own text has no labels"),
    ],
)
def test_own_text_that_nothing_would_come_of_is_refused_before_training(
    make_run: MakeRun, run_here: RunHere, asked: dict[str, Any], reason: str
) -> None:
    run = make_run(targets="live", on_policy=0.5, **asked)
    code, text = run_here(run)
    assert code == 2
    assert reason in text
    assert "next: " in text
    assert not steps(run)


def test_own_text_that_a_lost_teacher_cannot_judge_stays_the_datas() -> None:
    """12 of 16 sequences are answered for: 8 of the data, 4 the student's; the other 4 keep their text and labels."""
    trainer, own = small_trainer(ce_weight=0.3, kd_weight=0.7), OnPolicy(0.5, 5, 1.0, seed=7)
    supply = supply_of(Elsewhere(answers=12))
    with Feed(small_batch, range(1), supply=supply, ahead=0, on_policy=own) as feed:
        given = feed.next(0, trainer.student)
        lessons = list(given.lessons or ())
    assert given.fields["on_policy_sequences"] == 4
    assert given.fields["on_policy_tokens"] == 4 * 5
    assert given.fields["target_rows"] == 12 * (LENGTH - 1)
    fallen_back = lessons[-1]
    assert fallen_back.targets is None
    assert torch.equal(fallen_back.tokens, given.tokens[12:])
    assert fallen_back.use is not None
    assert bool(fallen_back.use.labelled.all())
    assert not bool(fallen_back.use.taught.any())
    result = trainer.step(0, given.tokens, lessons)
    assert (result.rows, result.kd_rows) == (SEQUENCES * (LENGTH - 1), 12 * (LENGTH - 1))
    assert result.ce_rows == SEQUENCES * (LENGTH - 1) - 4 * 5
    (note,) = supply.notes
    assert "the teacher is lost" in note
    assert "4 of 8 sequences" in note
