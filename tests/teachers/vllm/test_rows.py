"""A teacher says the same whoever computes it: transformers here, vLLM behind HTTP, vLLM's engine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from latentforge.data import ShardSet
from latentforge.spec.sections import TeacherSpec
from latentforge.targets.row import GRADED, SequenceTargets
from latentforge.targets.store import TargetStore
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.http.openai import OpenAITeacher
from latentforge.teachers.opening import open_teacher
from latentforge.teachers.scoring import check_agreement, check_scorable, score_all
from latentforge.teachers.serving.engine import EngineTeacher
from latentforge.teachers.serving.local import ServedTeacher
from latentforge.teachers.serving.processes import members
from latentforge.teachers.serving.server import VLLMServer

from .conftest import TOLERANCE, K, Rows, all_rows, worst_difference


@pytest.fixture(scope="session")
def engine(
    vllm_environment: Path, served_folder: Path, surroundings: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineTeacher]:
    """The engine in a process of its own, opened as a run opens it."""
    spec = TeacherSpec(backend="vllm-local-inproc", environment=str(vllm_environment), precision="fp32")
    env = {**surroundings, "XDG_STATE_HOME": str(tmp_path_factory.mktemp("state"))}
    found = open_teacher(spec, served_folder, "cpu", env)
    assert isinstance(found, EngineTeacher)
    found.memory_seconds = 0.0  # what other tests take meanwhile is no concern of these
    with found:
        yield found


def test_a_server_gives_the_rows_that_transformers_gives(hf_rows: Rows, http_rows: Rows) -> None:
    worst, mass = worst_difference(hf_rows, http_rows)
    print(f"hf and vLLM over HTTP: logprobs differ by at most {worst:.2g}, rest mass by {mass:.2g}")
    assert len(hf_rows) == 72
    assert worst <= TOLERANCE
    assert mass <= TOLERANCE


def test_a_server_of_the_runs_own_gives_them_too(
    hf_rows: Rows, vllm_server: VLLMServer, served_folder: Path, served_data: ShardSet
) -> None:
    client = OpenAITeacher.open(vllm_server.url, vllm_server.name, served_folder)
    own = ServedTeacher(vllm_server, client)  # not closed: it would end the server of the other tests
    check_scorable(own, served_data, k=K)
    found = dict(own.score(all_rows(served_data)[:8], k=K, temperatures=(1.0,)))
    client.close()
    worst, _ = worst_difference({number: hf_rows[number] for number in found}, found)
    assert len(found) == 8
    assert worst <= TOLERANCE


def test_the_comparison_sees_rows_that_stand_one_position_late(hf_rows: Rows) -> None:
    """The planted control."""

    def late(targets: SequenceTargets) -> SequenceTargets:
        tails = {t: np.roll(tail, 1) for t, tail in targets.tails.items()}
        return SequenceTargets(np.roll(targets.ids, 1, axis=0), np.roll(targets.logprobs, 1, axis=0), tails)

    worst, mass = worst_difference(hf_rows, {number: late(targets) for number, targets in hf_rows.items()})
    assert worst > 1000 * TOLERANCE
    assert mass > 100 * TOLERANCE


def test_the_engine_gives_the_rows_that_transformers_gives(
    hf_rows: Rows, engine: EngineTeacher, served_data: ShardSet
) -> None:
    found = dict(engine.score(all_rows(served_data), k=K, temperatures=(1.0,)))
    worst, mass = worst_difference(hf_rows, found)
    print(f"hf and vLLM's engine: logprobs differ by at most {worst:.2g}, rest mass by {mass:.2g}")
    assert worst <= TOLERANCE
    assert mass <= TOLERANCE


def test_an_answer_that_nobody_read_to_its_end_is_not_taken_for_the_next(
    hf_rows: Rows, engine: EngineTeacher, served_data: ShardSet
) -> None:
    documents = all_rows(served_data)
    left: Any = engine.score(documents[:8], k=4, temperatures=(1.0,))
    next(left)
    left.close()
    ((_, targets),) = engine.score([documents[9]], k=K, temperatures=(1.0,))
    assert worst_difference({0: hf_rows[9]}, {0: targets})[0] <= TOLERANCE


def test_a_run_fills_a_store_by_the_engine_as_by_transformers(
    tmp_path: Path, hf_rows: Rows, engine: EngineTeacher, served_data: ShardSet
) -> None:
    check_scorable(engine, served_data, k=K)
    with TargetStore.create(
        tmp_path / "targets.sqlite", engine.identity.as_json(), K, (1.0,), vocab_size=engine.vocab_size
    ) as store:
        assert score_all(engine, served_data, store, batch_size=16) == len(hf_rows)
        assert check_agreement(engine, store, served_data).worst < 0.05
        stored = {number: store.get(tokens) for number, tokens in enumerate(all_rows(served_data))}
    # What the store rounds is its own affair; here it must be the same row.
    assert worst_difference(hf_rows, stored)[0] < 0.05


def test_a_killed_engine_is_told_with_its_last_lines_and_leaves_nothing(
    engine: EngineTeacher, served_data: ShardSet
) -> None:
    os.kill(engine.kept.pid, signal.SIGKILL)
    with pytest.raises(TeacherFailure, match="was ended by SIGKILL") as caught:
        list(engine.score(all_rows(served_data)[:2], k=4, temperatures=(1.0,)))
    assert caught.value.kind == "cut"
    engine.close()
    assert members(engine.kept.session) == []


@pytest.mark.parametrize("rounding", ["none", "fine"])
def test_stores_filled_by_transformers_and_by_a_server_hold_the_same_rows(
    tmp_path: Path, rounding: Literal["none", "fine"], hf_rows: Rows, http_rows: Rows, served_data: ShardSet
) -> None:
    """To 1e-4 where nothing is rounded; where it is, entries that differ do so by one step."""
    documents = all_rows(served_data)

    def stored(name: str, rows: Rows) -> Rows:
        path, made = tmp_path / name, {"vocab_size": served_data.vocab_size, "rounding": rounding}
        with TargetStore.create(path, {"model": name}, K, (1.0,), **made) as store:
            store.put_many((documents[number], targets) for number, targets in rows.items())
        with TargetStore.open(path, rounding=rounding) as store:
            return {number: store.get(documents[number]) for number in rows}

    mine, theirs = stored("hf.sqlite", hf_rows), stored("vllm.sqlite", http_rows)
    moved = entries = 0
    if rounding == "none":
        worst, mass = worst_difference(mine, theirs)  # id by id: two that are as likely may stand in either order
        print(f"stored exactly: logprobs differ by at most {worst:.2g}, rest mass by {mass:.2g}")
        assert worst <= TOLERANCE
        assert mass <= TOLERANCE
        return
    for number, row in mine.items():
        apart = np.abs(row.logprobs - theirs[number].logprobs)
        # Half a step to each side, where the values as given lie closer than that; and float32's own rounding. An
        # entry is a level below its position's first, which may itself have moved by one of its steps.
        step = 2.0 * GRADED.error(row.logprobs) + 1e-5
        step[:, 1:] += 2.0 * GRADED.error(row.logprobs)[:, :1]
        assert (apart <= step + TOLERANCE).all()
        moved, entries = moved + int((apart > 0).sum()), entries + apart.size
    print(f"stored in steps: {moved} of {entries} entries differ ({moved / entries:.2%}), none by more than a step")
    assert moved / entries < 0.05
