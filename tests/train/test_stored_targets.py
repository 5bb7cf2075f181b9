"""Targets from a store: the whole data has rows before the first step, and they stay for the whole run."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latentforge.events import read_events
from latentforge.spec.run import RunDir
from latentforge.teachers.store import StoreTeacher
from latentforge.train import assembly
from latentforge.verdicts import ExitCode

MakeRun = Callable[..., RunDir]
RunHere = Callable[[RunDir], tuple[ExitCode, str]]


def change(run: RunDir, *statements: str) -> None:
    """Change the store that ``run`` trains on, as if its score run had written it so."""
    scored = run.input_run("targets")
    assert scored is not None
    with sqlite3.connect(scored.out / "targets.sqlite") as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()
    scored.artifacts_file.unlink()


@pytest.mark.parametrize("on_loss", ["stop", "degrade"])
@pytest.mark.parametrize(
    ("statements", "said"),
    [
        (["DELETE FROM rows WHERE rowid BETWEEN 30 AND 60"], "holds targets for 72.3 % (81 of 112 sequences)"),
        (
            ["UPDATE limits SET ttl_seconds = 1e6", "UPDATE rows SET stored = stored - 2e6 WHERE rowid > 100"],
            "12 rows are older than the 1e+06 s that it keeps them",
        ),
    ],
)
def test_a_store_that_lacks_rows_is_refused_before_the_first_step_with_its_coverage(
    make_run: MakeRun, run_here: RunHere, on_loss: str, statements: list[str], said: str
) -> None:
    """It is no teacher that was lost: what it lacks is known before anything is trained."""
    run = make_run(on_teacher_loss=on_loss)
    change(run, *statements)
    code, text = run_here(run)
    assert code == ExitCode.REFUSED, text
    assert said in text
    assert "latentforge dispatch go --attempt next" in text
    assert not [e for e in read_events(run.events_file) if e.kind in ("step", "metric")]


def test_rows_that_grow_too_old_while_they_are_trained_on_stay_for_the_run(
    make_run: MakeRun, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(steps=6)
    change(run, "UPDATE limits SET ttl_seconds = 1e6")
    times: Iterator[float] = iter(range(10**9))
    began, open_store = 0.0, StoreTeacher.open

    class Years:
        """A clock that goes on by a year each time that it is looked at."""

        @staticmethod
        def time() -> float:
            return began + 31_536_000.0 * next(times)

    def opened(path: Path, **named: Any) -> StoreTeacher:
        source = open_store(path, **{"clock": Years.time, **named})
        source.store._cache_limit = 0  # every row is read when it is asked for
        return source

    scored = run.input_run("targets")
    assert scored is not None
    began = open_store(scored.out / "targets.sqlite").store.stats()["stored"][0]
    monkeypatch.setattr(assembly, "time", Years)
    monkeypatch.setattr(StoreTeacher, "open", opened)
    code, text = run_here(run)
    assert code in (ExitCode.PASS, ExitCode.FAIL), text
    assert "KD coverage 100.0 %" in text
