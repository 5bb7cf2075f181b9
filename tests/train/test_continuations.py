"""Runs of the kind ``continuations``: every row is continued by its own teacher, whatever stops the run in between."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from latentforge.data import ShardSet
from latentforge.errors import RefusedError
from latentforge.events import read_events
from latentforge.spec.resolve import resolve_pipeline
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.spec.sections import PipelineSpec
from latentforge.targets.continuations import ContinuationStore
from latentforge.targets.store import MissingError
from latentforge.teachers.continuing import Continuing
from latentforge.teachers.continuing_store import continued_rows
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.hf import HFTeacher
from latentforge.train import teaching
from latentforge.train.inprocess import execute_pipeline, plan
from latentforge.train.run import execute
from latentforge.verdicts import ExitCode

CHUNK, COUNT, ROWS = 4, 3, 20
TEMPERATURES = (1.0, 0.5)
MakeRun = Callable[..., RunDir]


def sampled_spec(**continuations: Any) -> PipelineSpec:
    """``tiny`` with a latent student that is taught by continuations."""
    values = {"count": COUNT, "temperatures": list(TEMPERATURES), "rows": ROWS, "batch_size": 4, **continuations}
    overrides = (
        "through=latent",
        f"data.chunk={CHUNK}",
        "data.train_sequences=24",
        "data.heldout_sequences=6",
        "teacher.steps=10",
        "latent.sample_weight=1.0",
        "latent.tempered_weight=1.0",
        "latent.sample_continuations=1",
        *(f"continuations.{name}={json.dumps(value)}" for name, value in values.items()),
    )
    return resolve_pipeline("tiny", env={}, overrides=overrides).spec


@pytest.fixture(scope="module")
def text() -> io.StringIO:
    """What the runs wrote for people."""
    return io.StringIO()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, text: io.StringIO) -> dict[str, RunDir]:
    """Data, teacher and continuations, made once."""
    root = tmp_path_factory.mktemp("continued")
    return {str(k): v for k, v in execute_pipeline(sampled_spec(), root, through="continuations", text=text).items()}


@pytest.fixture
def make_run(done: dict[str, RunDir]) -> MakeRun:
    """``make_run(attempt, predecessor=None, **continuations)``: another run folder beside the same inputs."""

    def make(attempt: int, predecessor: RunDir | None = None, **continuations: Any) -> RunDir:
        planned = next(p for p in plan(sampled_spec(**continuations)) if p.kind == "continuations")
        identity = planned.identity.at_attempt(attempt)
        before = predecessor.run if predecessor else None
        launch = LaunchRecord(identity.run_id, planned.kin, planned.resolved, predecessor=before)
        return RunDir.create(done["data"].path.parent, identity, launch)

    return make


def store_of(run: RunDir, *, readonly: bool = True) -> ContinuationStore:
    return ContinuationStore.open(run.out / "continuations.sqlite", readonly=readonly)


def rows_of(done: dict[str, RunDir]) -> list[Any]:
    return [tokens for block in continued_rows(ShardSet.open(done["data"].out), ROWS) for tokens in block]


def assert_same_rows(done: dict[str, RunDir], run: RunDir) -> None:
    with store_of(run) as found, store_of(done["continuations"]) as wanted:
        for tokens in rows_of(done):
            one, other = found.get(tokens), wanted.get(tokens)
            assert all(np.array_equal(one[t], other[t]) for t in TEMPERATURES)


@contextmanager
def stopped_after(rows: int, stop: Callable[[], Any]) -> Iterator[None]:
    """``stop`` is called in place of drawing one row more than so many."""
    left, drawn = [rows], HFTeacher.continuations

    def draw(*asked: Any) -> Iterator[Any]:
        for found in drawn(*asked):
            if not left[0]:
                stop()
            left[0] -= 1
            yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFTeacher, "continuations", draw)
        yield


def test_every_asked_row_is_continued_by_the_runs_own_teacher(done: dict[str, RunDir], text: io.StringIO) -> None:
    data, run = ShardSet.open(done["data"].out), done["continuations"]
    teacher = HFTeacher.open(done["teacher"].out / "model")
    asked = Continuing(CHUNK, COUNT, TEMPERATURES, data.eos_id, 7)
    with store_of(run) as store:
        assert store.made.identity == teacher.identity.as_json()
        tokens = data.heldout.rows(np.array([2]))[0]
        ((_, again),) = teacher.continuations([tokens], asked)
        kept = store.get(tokens)
        ended = [again[t] == data.eos_id for t in TEMPERATURES]
        for temperature, ends in zip(TEMPERATURES, ended, strict=True):
            before_end = ~np.logical_or.accumulate(ends, axis=-1)
            assert np.array_equal(kept[temperature][before_end], again[temperature][before_end])
        with pytest.raises(MissingError):
            store.get(data.train.rows(np.array([ROWS]))[0])
    record = json.loads((run.out / "continuations.json").read_text())
    assert record["training_rows"] == ROWS
    assert record["sequences"] == ROWS + len(data.heldout)
    assert record["agreement"]["worst_nats"] < 1e-3
    assert record["agreement"]["tokens"] > 50
    assert "coverage 100.0 %" in text.getvalue()
    assert "memory planned: teacher" in text.getvalue()


def test_a_run_that_is_killed_between_rows_is_taken_over_and_damaged_rows_are_drawn_again(
    done: dict[str, RunDir], make_run: MakeRun
) -> None:
    killed = make_run(2)
    child = os.fork()
    if not child:
        with stopped_after(5, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            execute(killed.path, text=io.StringIO())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with store_of(killed, readonly=False) as store:
        assert store.stats()["rows"] == 5
        with store._connection.transaction() as connection:
            wrong = (b"LFC1" + bytes(40), store.key(rows_of(done)[0]))
            connection.execute("UPDATE rows SET value = ? WHERE key = ?", wrong)
    before = (killed.out / "continuations.sqlite").read_bytes()
    second, words = make_run(3, killed), io.StringIO()
    assert execute(second.path, text=words) is ExitCode.PASS
    assert f"takes over the store of {killed.run}" in words.getvalue()
    assert f"1 rows of {killed.run} were damaged" in words.getvalue()
    assert json.loads((second.out / "continuations.json").read_text())["new_rows"] == ROWS + 6 - 4
    assert (killed.out / "continuations.sqlite").read_bytes() == before, "its own folder is not touched"
    assert_same_rows(done, second)


def test_a_teacher_that_is_lost_ends_the_run_which_says_what_is_kept(make_run: MakeRun) -> None:
    def lose() -> None:
        raise TeacherFailure("cut", "the server went away", url="http://127.0.0.1:1/v1")

    run, words = make_run(7), io.StringIO()
    with stopped_after(6, lose):
        assert execute(run.path, text=words) is ExitCode.UNKNOWN
    assert "the teacher was lost; kept in continuations.sqlite: 23.0 % (6 of 26 sequences)" in words.getvalue()
    assert not (run.out / "continuations.json").exists()


def test_a_run_whose_rows_are_all_there_asks_nobody_and_says_that_it_compared_nothing(
    done: dict[str, RunDir], make_run: MakeRun
) -> None:
    again, words = make_run(4, done["continuations"]), io.StringIO()
    assert execute(again.path, text=words) is ExitCode.PASS
    assert json.loads((again.out / "continuations.json").read_text())["agreement"] is None
    assert "the teacher was not asked" in words.getvalue()
    assert_same_rows(done, again)


def test_a_store_of_other_draws_is_not_taken_over(done: dict[str, RunDir], make_run: MakeRun) -> None:
    other, words = make_run(5, done["continuations"], count=2), io.StringIO()
    assert execute(other.path, text=words) is ExitCode.PASS
    assert "is not taken over" in words.getvalue()
    with store_of(other) as store:
        assert store.made.count == 2


def test_more_rows_than_the_data_has_are_refused_by_name_before_the_teacher_is_opened(
    done: dict[str, RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RefusedError, match=r"continuations.rows = 25 is more than data.train_sequences = 24"):
        sampled_spec(rows=25)
    planned = next(p for p in plan(sampled_spec()) if p.kind == "continuations")
    # As of a corpus of which all rows are taken: how many there are is known when they are packed.
    asked = {**planned.identity.spec, "continuations": {**planned.identity.spec["continuations"], "rows": 25}}
    identity = replace(planned.identity, spec=asked)
    launch = LaunchRecord(identity.run_id, planned.kin, planned.resolved)
    run = RunDir.create(done["data"].path.parent, identity, launch)
    monkeypatch.setattr(teaching, "open_teacher", lambda *_, **__: pytest.fail("the teacher was opened"))
    assert execute(run.path, text=io.StringIO()) is ExitCode.REFUSED
    reasons = [str(event.fields.get("reason", "")) for event in read_events(run.events_file)]
    assert any("continuations.rows = 25: there are 24 training rows" in reason for reason in reasons)


@pytest.mark.parametrize("backend", ["venice", "vllm-local-inproc", "store"])
def test_a_teacher_that_does_not_continue_texts_is_refused_before_anything_starts(backend: str) -> None:
    from latentforge.spec.abilities import check_abilities

    spec = sampled_spec()
    spec = spec.model_copy(update={"teacher": spec.teacher.model_copy(update={"backend": backend})})
    with pytest.raises(RefusedError, match=r"latent.*continue a raw text"):
        check_abilities(spec)
