"""A student of another tokenizer learns from a teacher through the spans that both have, or the run is refused."""

from __future__ import annotations

import io
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from latentforge.data import ShardSet
from latentforge.errors import FailedError, RefusedError
from latentforge.events import read_events
from latentforge.spec.run import RunDir
from latentforge.spec.sections import PipelineSpec
from latentforge.targets.store import TargetStore
from latentforge.teachers.crossed import CrossCoverage, CrossedTeacher
from latentforge.teachers.fixture import FixtureTeacher
from latentforge.train import effective
from latentforge.train.inprocess import execute_pipeline
from latentforge.train.rehearsal import tiny_spec


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("across")


@pytest.fixture(scope="module")
def corpus(root: Path) -> str:
    """Some 60 small sources of Python's library: the whole of it takes seconds to read."""
    folder = root / "corpus"
    folder.mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    small = [path for path in sorted(library.glob("*.py")) if 1500 < path.stat().st_size < 12_000]
    for path in small[:60]:
        (folder / path.name).write_bytes(path.read_bytes())
    return str(folder)


@pytest.fixture(scope="module")
def teacher(root: Path, corpus: str) -> Path:
    """A teacher of 320 tokens, trained by the project."""
    spec = tiny_spec()
    spec = spec.model_copy(
        update={
            "teacher": spec.teacher.model_copy(update={"steps": 40}),
            "data": spec.data.model_copy(update={"corpus": corpus, "train_sequences": 96, "heldout_sequences": 8}),
        }
    )
    return execute_pipeline(spec, root, through="teacher", text=io.StringIO())["teacher"].out / "model"


def across(teacher: Path, **distill: Any) -> PipelineSpec:
    """The same corpus in 384 tokens of its own, for a student of that vocabulary."""
    corpus = str(teacher.parents[3] / "corpus")
    spec = tiny_spec(
        **{
            "cross_tokenizer": True,
            "min_coverage": 0.5,
            "steps": 40,
            "ce_weight": 0.0,
            "kd_weight": 1.0,
            "warmup_steps": 2,
            "require": (),
            **distill,
        }
    )
    # The teacher has 32 positions, and more tokens for the same bytes.
    sizes = {"vocab_size": 384, "sequence_length": 20, "train_sequences": 64, "heldout_sequences": 8, "corpus": corpus}
    return PipelineSpec.model_validate(
        {
            **spec.model_dump(),
            "data": {**spec.data.model_dump(), **sizes},
            "teacher": {**spec.teacher.model_dump(), "model": str(teacher)},
        }
    )


@pytest.fixture(scope="module")
def text() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(scope="module")
def runs(teacher: Path, root: Path, text: io.StringIO) -> dict[str, RunDir]:
    return dict(execute_pipeline(across(teacher), root, text=text))


def metrics(run: RunDir, name: str, **where: Any) -> list[dict[str, Any]]:
    events = [event.fields for event in read_events(run.events_file) if event.kind == "metric"]
    return [one for one in events if one["name"] == name and all(one.get(k) == v for k, v in where.items())]


def test_the_teacher_is_scored_in_its_own_tokens_and_the_data_is_the_students(
    runs: dict[str, RunDir], text: io.StringIO
) -> None:
    data = ShardSet.open(runs["data"].out)
    assert data.vocab_size == 384
    with TargetStore.open(runs["score"].out / "targets.sqlite") as store:
        assert store.vocab_size == 320
        assert store.stats()["rows"] == 72
    assert "coverage 100.0 % (72 of 72 sequences)" in text.getvalue()
    assert "tokens have a student token of the same bytes" in text.getvalue()


def test_a_live_teacher_of_another_tokenizer_teaches_what_its_stored_rows_teach(
    runs: dict[str, RunDir], teacher: Path, root: Path
) -> None:
    spec = across(teacher, targets="live", steps=4)
    live = execute_pipeline(spec, root, text=io.StringIO())["distill"]
    stored = [event.fields for event in read_events(runs["distill"].events_file) if event.kind == "step"]
    steps = [event.fields for event in read_events(live.events_file) if event.kind == "step"]
    assert len(steps) == 4
    # The first step is before any weight has moved, and before the two schedules part.
    for name in ("batch_sha256", "kd_rows", "silent_rows"):
        assert steps[0][name] == stored[0][name]
    assert 0 < steps[0]["kd_rows"] < steps[0]["rows"]
    assert steps[0]["kd"] == pytest.approx(stored[0]["kd"], rel=1e-3)


def test_positions_that_nothing_trains_are_said(text: io.StringIO, runs: dict[str, RunDir]) -> None:
    assert "distill.ce_weight = 0: " in text.getvalue()
    assert "are trained on nothing" in text.getvalue()


def test_the_least_coverage_in_force_is_the_one_that_the_open_teacher_was_held_to(runs: dict[str, RunDir]) -> None:
    assert effective.read(runs["distill"])["effective"]["distill"]["min_coverage"] == 0.5
    found = CrossCoverage(positions=100, single=40, several=0, split=60, longest=9, shortest=2)
    with pytest.raises(RefusedError, match=r"coverage 0\.4000 is below distill\.min_coverage = 0\.5"):
        CrossedTeacher(FixtureTeacher(8), None, coverage=found, least=0.5)  # type: ignore[arg-type]


def test_loss_and_kl_fall_with_kd_alone_across_tokenizers(runs: dict[str, RunDir]) -> None:
    (share,) = {one["value"] for one in metrics(runs["distill"], "cross_tokenizer_coverage")}
    first, last = (metrics(runs["distill"], "val_kl", model="student", step=step)[0]["value"] for step in (0, 40))
    assert last < 0.8 * first
    assert 0.5 < share < 1.0
    loss = [metrics(runs["distill"], "val_loss", model="student", step=step)[0]["value"] for step in (0, 40)]
    assert loss[1] < loss[0]  # nothing but the teacher was trained on


def test_coverage_is_what_the_trainer_was_given(runs: dict[str, RunDir], text: io.StringIO) -> None:
    found = metrics(runs["distill"], "cross_tokenizer_coverage")[0]
    reported = metrics(runs["distill"], "kd_coverage", model="student")[-1]
    # The survey knows no rows of the teacher: a path whose own tokens are outside its top-k is not told.
    assert reported["target_rows"] < reported["rows"]
    assert reported["value"] == pytest.approx(found["value"], abs=0.12)
    assert found["single"] + found["several"] == round(found["value"] * found["positions"])
    assert "student positions carry KD" in text.getvalue()


def test_a_coverage_below_the_asked_one_is_refused_with_the_figure(teacher: Path, root: Path) -> None:
    with pytest.raises(FailedError, match=r"cross-tokenizer coverage 0\.\d+ is below distill\.min_coverage = 0\.99"):
        execute_pipeline(across(teacher, min_coverage=0.99), root, text=io.StringIO())


def test_two_tokenizers_without_being_asked_to_be_aligned_are_refused(teacher: Path, root: Path) -> None:
    spec = across(teacher)
    student = root / "student"
    if not student.exists():
        made = execute_pipeline(spec, root, text=io.StringIO())["distill"]
        (made.out / "student").rename(student)
    spec = across(teacher, cross_tokenizer=False, init=str(student))
    with pytest.raises(FailedError, match="vocabularies differ first at id"):
        execute_pipeline(spec, root, text=io.StringIO())


def test_a_teacher_that_is_trained_here_has_the_datas_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"cross_tokenizer = true, and teacher\.model names no teacher"):
        PipelineSpec.model_validate({"distill": {"cross_tokenizer": True}})
