"""Token-level models on rows of chunks: what fills a chunk after a document's end is in no loss, metric or count."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latentforge.events import Event, read_events
from latentforge.kernels.targets import DenseTargets
from latentforge.spec.sections import PipelineSpec
from latentforge.students.causal import IGNORE, Padding, RowUse, Student
from latentforge.teachers.fixture import FixtureTeacher
from latentforge.train import assembly
from latentforge.train import teacher as recipe
from latentforge.train.feed import _counted
from latentforge.train.inprocess import execute_pipeline
from latentforge.train.loop import Lesson, Trainer, evaluate
from latentforge.train.rehearsal import VOCABULARY, small_batch, small_trainer

from .conftest import short_spec

EOS, CHUNK = 0, 4


def batch() -> Tensor:
    """Rows of 12 tokens, chunks of 4; documents end inside a chunk, at its end, or not at all."""
    tokens = small_batch().clamp_min(1)
    tokens[::3, 5:8] = EOS
    tokens[1::3, 7] = EOS
    tokens[::2, 10:] = EOS
    return tokens


def text_rows(tokens: Tensor) -> Tensor:
    """The rows whose next token is no padding, bool [B·(L-1)], told place by place."""
    found = torch.ones(len(tokens), tokens.shape[1] - 1, dtype=torch.bool)
    for row, column in ((r, c) for r in range(len(tokens)) for c in range(1, tokens.shape[1])):
        begin = column - column % CHUNK
        found[row, column - 1] = EOS not in tokens[row, begin:column]
    return found.flatten()


def trainer(*, counted: bool = False) -> Trainer:
    """A trainer on rows of chunks; ``counted`` plants one that takes padding for text."""
    one = small_trainer(ce_weight=0.5, kd_weight=0.5)
    one.student.padding = None if counted else Padding(CHUNK, EOS)
    return one


def fixture(tokens: Tensor) -> DenseTargets:
    return FixtureTeacher(VOCABULARY).targets(tokens, temperature=1.0)


def by_hand(student: Student, rows: Tensor) -> tuple[float, float]:
    """The mean cross-entropy and KL of some of the batch's rows, in torch."""
    student.eval()
    with torch.no_grad():
        log_q = student.logits(batch()).log_softmax(-1)[rows]
        log_p = fixture(batch()).logits.log_softmax(-1)[rows]
    labels = batch()[:, 1:].flatten()[rows]
    return float(-log_q.gather(1, labels[:, None]).mean()), float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_labels_leave_out_what_follows_an_end_in_its_chunk() -> None:
    student = trainer().student
    rows = torch.tensor(
        [[5, 6, 7, 8, 9, EOS, EOS, EOS, 3, 4, 5, EOS], [EOS, EOS, EOS, EOS, 1, 2, 3, EOS, EOS, 0, 0, 0]]
    )
    out = IGNORE
    assert student.labels(rows).reshape(2, -1).tolist() == [
        [6, 7, 8, 9, EOS, out, out, 3, 4, 5, EOS],
        [out, out, out, 1, 2, 3, EOS, EOS, out, out, out],
    ]


def test_a_step_trains_the_text_alone_and_says_what_was_padding() -> None:
    text = text_rows(batch())
    one = trainer()
    ce, kd = by_hand(one.student, text)
    found = one.step(0, batch(), fixture)
    assert (found.rows, found.denominator, found.kd_rows) == (int(text.sum()),) * 3
    assert found.padding == int((~text).sum()) > 10
    assert (found.ce, found.kd) == (pytest.approx(ce, rel=1e-5), pytest.approx(kd, rel=1e-5))
    counted = trainer(counted=True).step(0, batch(), fixture)
    assert counted.padding is None
    assert counted.rows == len(text)
    assert abs(counted.loss - found.loss) > 0.01


def test_the_gradient_is_that_of_the_text_alone() -> None:
    def gradient(counted: bool, labels: Tensor) -> Tensor:
        """Of the loss as it is trained, less that of the rows of ``labels``, computed in torch."""
        one = trainer(counted=counted)
        parts = one.pass_over(Lesson(batch(), fixture(batch())), int((labels != IGNORE).sum()))
        parts.loss.backward()
        found = torch.cat([p.grad.flatten() for p in one.student.parameters() if p.grad is not None])
        other = trainer()
        rows, count = labels != IGNORE, int((labels != IGNORE).sum())
        log_q = other.student.logits(batch()).log_softmax(-1)[rows]
        log_p = fixture(batch()).logits.log_softmax(-1)[rows]
        ce = -log_q.gather(1, labels[rows][:, None]).sum()
        ((ce + (log_p.exp() * (log_p - log_q)).sum()) * 0.5 / count).backward()
        wanted = torch.cat([p.grad.flatten() for p in other.student.parameters() if p.grad is not None])
        return (found - wanted).norm() / wanted.norm()

    labels = trainer().student.labels(batch())
    assert gradient(False, labels) < 1e-4
    assert gradient(True, labels) > 0.05


def test_rows_of_two_uses_leave_padding_out_too() -> None:
    text = text_rows(batch())
    taught = torch.arange(len(text)) % 2 == 0
    one = trainer()
    targets = DenseTargets(fixture(batch()).logits[taught])
    lesson = Lesson(batch(), targets, RowUse(torch.ones_like(text), taught, 1.0))
    found = one.step(0, batch(), [lesson])
    assert (found.rows, found.kd_rows) == (int(text.sum()), int((text & taught).sum()))
    fields = {"target_rows": 0, "silent_rows": 0}
    list(_counted([lesson], fields, one.student))
    assert fields == {"target_rows": found.kd_rows, "silent_rows": 0}


def test_held_out_values_are_means_over_the_text_alone() -> None:
    one, text = trainer(), text_rows(batch())
    ce, kl = by_hand(one.student, text)
    settings = {"temperature": 1.0, "backend": "cpu"}
    found = evaluate(one.student, [batch()], fixture, **settings)
    assert (found.loss, found.kl) == (pytest.approx(ce, rel=1e-5), pytest.approx(kl, rel=1e-5))
    assert found.rows == int(text.sum())
    counted = evaluate(trainer(counted=True).student, [batch()], fixture, **settings)
    assert abs(counted.loss - found.loss) > 0.01
    assert abs(counted.kl - found.kl) > 0.001  # type: ignore[operator]


def events_of(root: Path) -> dict[str, list[Event]]:
    """A short line from data to student on short documents in rows of chunks of 8."""
    chance = random.Random(5)
    words = ["".join(chance.choices("abcdefghij", k=chance.randrange(2, 6))) for _ in range(90)]
    root.mkdir()
    texts = (" ".join(chance.choices(words, k=chance.randrange(2, 12))) for _ in range(3000))
    (root / "short.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    spec = short_spec(steps=3, checkpoint_every=3, warmup_steps=0, require=())
    data = spec.data.model_copy(update={"chunk": 8, "corpus": str(root / "short.jsonl")})
    teacher = spec.teacher.model_copy(update={"steps": 3, "warmup_steps": 0})
    chunked = spec.model_copy(update={"data": data, "teacher": teacher})
    runs = execute_pipeline(PipelineSpec.model_validate(chunked.model_dump()), root, text=io.StringIO())
    return {name: read_events(run.events_file) for name, run in runs.items()}


def test_a_line_on_rows_of_chunks_trains_teacher_and_student_on_text_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = events_of(tmp_path / "text")
    for kind in ("teacher", "distill"):
        steps = [one.fields for one in events[kind] if one.kind == "step"]
        assert all(s["rows"] == s["denominator"] for s in steps)
        assert sum(s["padding"] for s in steps) > 0
        said = {one.fields["falsifier"]: one.fields for one in events[kind] if one.kind == "verdict"}
        assert {one["outcome"] for one in said.values()} == {"pass"}
        assert "places were padding" in said["F-BATCH-ROWS-001"]["text"]
    assert "KD coverage 100.0 %" in said["F-TEACHER-COVERAGE-001"]["text"]
    assert sum(s["target_rows"] for s in steps) == sum(s["rows"] for s in steps if s["model"] == "student")

    def values(found: dict[str, list[Event]]) -> list[float]:
        return [
            one.fields["value"]
            for kind in ("teacher", "distill")
            for one in found[kind]
            if one.kind == "metric" and one.fields["name"] in ("val_loss", "val_kl")
        ]

    for module in (assembly, recipe):  # padding that is taken for text
        monkeypatch.setattr(module, "padding_of", lambda data: None)
    counted = values(events_of(tmp_path / "counted"))
    assert all(abs(a - b) > 1e-4 for a, b in zip(values(events), counted, strict=True))
