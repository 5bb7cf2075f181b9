"""A cache before a teacher: nothing is asked twice, nothing is lost with the teacher, nothing is written read-only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentforge.data import ShardSet
from latentforge.errors import RefusedError
from latentforge.evidence.digests import file_sha256
from latentforge.targets import SequenceTargets, TargetStore
from latentforge.teachers.cached import CachedTeacher
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.fixture import FixtureTeacher
from latentforge.teachers.protocol import Tokens
from latentforge.teachers.scoring import score_all

ONE = (1.0,)


class Counting(FixtureTeacher):
    """The fixture, which counts what it is asked and dies after ``lives`` documents."""

    def __init__(self, lives: int = 1000) -> None:
        super().__init__(270)
        self.asked: list[bytes] = []
        self.lives = lives

    @property
    def capabilities(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"score"})

    def score(
        self, sequences: Sequence[Tokens], *, k: int, temperatures: tuple[float, ...]
    ) -> Iterator[tuple[int, SequenceTargets]]:
        for number, tokens in enumerate(sequences):
            if len(self.asked) >= self.lives:
                raise TeacherFailure("connection", "gone")
            self.asked.append(np.asarray(tokens).tobytes())
            yield from ((number, one) for _, one in super().score([tokens], k=k, temperatures=temperatures))


@pytest.fixture
def documents(shards: ShardSet) -> list[Tokens]:
    return [np.asarray(row) for row in shards.train.rows(np.arange(6))]


def opened(path: Path, teacher: Counting, *, readonly: bool = False) -> CachedTeacher:
    return CachedTeacher.open(path, teacher, k=8, temperatures=ONE, readonly=readonly)


def test_what_is_stored_is_not_asked_again_and_says_the_same(documents: list[Tokens], tmp_path: Path) -> None:
    path, teacher = tmp_path / "cache" / "kd.sqlite", Counting()
    first = opened(path, teacher)
    fresh = dict(first.score([*documents, documents[0]], k=8, temperatures=ONE))
    assert len(teacher.asked) == 6, "equal documents are asked once"
    first.close()
    again, silent = Counting(lives=0), opened(path, Counting(lives=0))
    kept = dict(silent.score(documents, k=8, temperatures=ONE))
    assert not again.asked
    for number in range(6):
        assert np.array_equal(kept[number].ids, fresh[number].ids)
    counted = silent.metrics()
    assert (counted["hit_rate"], counted["rows_from_store"]) == (1.0, 6)
    narrow = dict(silent.score(documents[:1], k=3, temperatures=ONE))[0]
    assert np.array_equal(narrow.ids, fresh[0].ids[:, :3])
    silent.close()


def test_a_teacher_that_dies_leaves_the_stored_rows_and_all_that_it_answered(
    documents: list[Tokens], tmp_path: Path
) -> None:
    path = tmp_path / "kd.sqlite"
    with_two = opened(path, Counting())
    dict(with_two.score(documents[3:5], k=8, temperatures=ONE))
    with_two.close()
    dying = opened(path, Counting(lives=2))
    given: dict[int, SequenceTargets] = {}

    def ask() -> None:
        for number, targets in dying.score(documents, k=8, temperatures=ONE):
            given[number] = targets

    with pytest.raises(TeacherFailure, match="gone") as caught:
        ask()
    assert sorted(given) == [0, 1, 3, 4], "the stored ones first, then the two that were answered"
    assert caught.value.__notes__ == ["2 of 6 sequences were given from kd.sqlite"]
    dying.close()
    with TargetStore.open(path) as store:
        assert store.coverage(store.key(tokens) for tokens in documents).present == 4


def test_a_read_only_cache_is_read_and_never_written(documents: list[Tokens], tmp_path: Path) -> None:
    path = tmp_path / "kd.sqlite"
    filled = opened(path, Counting())
    dict(filled.score(documents[:2], k=8, temperatures=ONE))
    filled.close()
    before, teacher = file_sha256(path), Counting()
    cached = opened(path, teacher, readonly=True)
    assert len(dict(cached.score(documents, k=8, temperatures=ONE))) == 6
    assert len(teacher.asked) == 4
    cached.close()
    assert file_sha256(path) == before
    assert [one.name for one in tmp_path.iterdir()] == ["kd.sqlite"]


def test_another_teachers_cache_is_refused(documents: list[Tokens], tmp_path: Path) -> None:
    opened(tmp_path / "kd.sqlite", Counting()).close()
    with TargetStore.open(tmp_path / "kd.sqlite") as store, pytest.raises(RefusedError, match="another teacher"):
        CachedTeacher(store, FixtureTeacher(269))


@pytest.mark.parametrize(
    ("name", "asked", "said", "next"),
    [
        ("drawn.sqlite", {}, "was made for mode 'sample', not for 'topk'", "name another file in teacher.cache"),
        ("four.sqlite", {}, "holds 4 entries a row, and score.k = 8", "set score.k = 4 or less, or name another file"),
        ("four.sqlite", {"k": 4, "temperatures": (2.0,)}, "tails for T = 1, and none for T = 2", "name another file"),
        ("none.sqlite", {"readonly": True}, "there is no such store", "fill it by a run without --kd-cache-ro"),
        (".", {}, "it is no file", "name another file"),
        ("four.sqlite/kd.sqlite", {}, "its folder cannot be made: File exists", "name another file"),
    ],
)
@pytest.mark.parametrize("readonly", [False, True])
def test_a_cache_that_cannot_hold_what_is_asked_is_refused_and_nothing_is_made(
    tmp_path: Path, name: str, asked: dict[str, Any], said: str, next: str, readonly: bool
) -> None:
    """Drawn rows that are as wide as those asked for would be taken for the likeliest tokens."""
    identity, drawn = Counting().identity.as_json(), {"mode": "sample", "draws": 8, "seed": 7}
    TargetStore.create(tmp_path / "drawn.sqlite", identity, 8, ONE, vocab_size=270, **drawn).close()
    TargetStore.create(tmp_path / "four.sqlite", identity, 4, ONE, vocab_size=270).close()
    if readonly and name.endswith("/kd.sqlite"):
        said = "there is no such store"
    with pytest.raises(RefusedError, match=said) as caught:
        CachedTeacher.open(tmp_path / name, Counting(), **{"k": 8, "temperatures": ONE, "readonly": readonly, **asked})
    assert next in str(caught.value.next)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["drawn.sqlite", "four.sqlite"]


def test_a_stored_row_that_goes_while_others_are_given_is_asked_again(documents: list[Tokens], tmp_path: Path) -> None:
    """A limit of age, or another run that made room in the same cache: no reason to end a run that has a teacher."""
    now, teacher = [0.0], Counting()
    about = teacher.identity.as_json(), 8, ONE
    store = TargetStore.create(tmp_path / "kd.sqlite", *about, vocab_size=270, ttl_seconds=10.0, clock=lambda: now[0])
    cached = CachedTeacher(store, teacher)
    fresh = dict(cached.score(documents, k=8, temperatures=ONE))
    given = {}
    for number, targets in cached.score(documents, k=8, temperatures=ONE):
        given[number] = targets
        if len(given) == 2:
            now[0] = 11.0
    cached.close()
    assert sorted(given) == list(range(6))
    assert all(np.array_equal(given[number].ids, fresh[number].ids) for number in range(6))
    assert len(teacher.asked) == 6 + 4
    assert cached.metrics()["rows_from_store"] == 2


def test_a_teacher_in_this_process_computes_a_batch_at_a_time_behind_a_cache_too(
    shards: ShardSet, tmp_path: Path
) -> None:
    """It takes what one call asks for as one batch, and 4096 rows of a large vocabulary fit no memory."""
    sizes = []

    class Here(FixtureTeacher):
        def score(
            self, sequences: Sequence[Tokens], *, k: int, temperatures: tuple[float, ...]
        ) -> Iterator[tuple[int, SequenceTargets]]:
            sizes.append(len(sequences))
            return super().score(sequences, k=k, temperatures=temperatures)

    here = Here(270)
    cached = CachedTeacher.open(tmp_path / "kd.sqlite", here, k=8, temperatures=ONE)
    with TargetStore.create(tmp_path / "t.sqlite", here.identity.as_json(), 8, ONE, vocab_size=270) as store:
        assert score_all(cached, shards, store, batch_size=4) == 46
    cached.close()
    assert max(sizes) <= 4, sizes
    assert sum(sizes) == 46


def test_a_batch_of_targets_comes_from_the_cache_too(documents: list[Tokens], tmp_path: Path) -> None:
    cached = opened(tmp_path / "kd.sqlite", Counting())
    tokens = torch.from_numpy(np.stack(documents))
    targets = cached.targets(tokens, temperature=1.0)
    live = FixtureTeacher(270).targets(tokens, temperature=1.0, k=8)
    assert torch.equal(targets.ids.long(), live.ids.long())  # type: ignore[union-attr]
    with pytest.raises(RefusedError, match="k = 9"):
        cached.targets(tokens, temperature=1.0, k=9)
    cached.close()


def test_every_answered_document_is_stored_before_the_next_is_waited_for(shards: ShardSet, tmp_path: Path) -> None:
    path = tmp_path / "targets.sqlite"
    teacher, seen = Counting(lives=9), []
    with TargetStore.create(path, teacher.identity.as_json(), 8, ONE, vocab_size=270) as store:

        def progress(done: int, total: int) -> None:
            seen.append((done, store.stats()["rows"]))

        with pytest.raises(TeacherFailure):
            score_all(teacher, shards, store, batch_size=4, progress=progress)
        assert all(done == rows for done, rows in seen)
        assert seen[-1][0] == 9
        teacher.lives = 1000
        assert score_all(teacher, shards, store, batch_size=4) == 46 - 9
    assert len(teacher.asked) == len(set(teacher.asked)) == 46, "no document is asked twice"
