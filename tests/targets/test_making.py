"""Of several that make one store at once, one makes it; nobody's rows are lost, and the others are told."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentforge.errors import RefusedError
from latentforge.targets import TargetStore
from latentforge.teachers.cached import CachedTeacher
from latentforge.teachers.fixture import FixtureTeacher

TEACHER, K, ONE, MAKERS = FixtureTeacher(64), 4, (1.0,), 6
TOKENS = np.array([1, 2, 3])


def make(path: Path) -> TargetStore:
    return TargetStore.create(path, TEACHER.identity.as_json(), K, ONE, vocab_size=TEACHER.vocab_size)


def test_of_several_makers_of_one_store_one_succeeds_and_keeps_its_rows(tmp_path: Path) -> None:
    together, told = threading.Barrier(MAKERS), []
    ((_, targets),) = TEACHER.score([TOKENS], k=K, temperatures=ONE)

    def maker(number: int) -> None:
        for at in range(10):
            path = tmp_path / f"{at}.sqlite"
            together.wait(60)
            try:
                with make(path) as store:
                    told.append((at, store.put(TOKENS, targets)))
            except RefusedError as error:
                told.append((at, str(error)))
            except BaseException as error:
                told.append((at, repr(error)))

    threads = [threading.Thread(target=maker, args=(number,)) for number in range(MAKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at in range(10):
        path = tmp_path / f"{at}.sqlite"
        said = [what for store, what in told if store == at]
        assert said.count(True) == 1, said
        assert said.count(f"{path} exists already") == MAKERS - 1, said
        with TargetStore.open(path) as store:
            assert np.array_equal(store.get(TOKENS).ids, targets.ids)
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(f"{at}.sqlite" for at in range(10))


def test_a_cache_that_another_run_has_just_made_is_opened_and_its_rows_are_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, create = tmp_path / "kd.sqlite", TargetStore.create
    ((_, targets),) = TEACHER.score([TOKENS], k=K, temperatures=ONE)

    def second(*words: Any, **named: Any) -> TargetStore:
        with create(*words, **named) as theirs:  # between the look at the file and its making
            theirs.put(TOKENS, targets)
        return create(*words, **named)

    monkeypatch.setattr(TargetStore, "create", second)
    cached = CachedTeacher.open(path, TEACHER, k=K, temperatures=ONE)
    assert len(list(cached.score([TOKENS], k=K, temperatures=ONE))) == 1
    assert cached.asked == 0
    cached.close()
