"""``teacher check`` of a store: it is judged by the rows that it holds, since nothing else can be asked of it."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from latentforge.data import ShardSet
from latentforge.spec.sections import TeacherSpec
from latentforge.targets.store import TargetStore
from latentforge.teachers.checking import check_teacher
from latentforge.teachers.findings import Report
from latentforge.teachers.hf import HFTeacher


@pytest.fixture
def store(teacher_folder: Path, shards: ShardSet, tmp_path: Path) -> Path:
    path, teacher = tmp_path / "targets.sqlite", HFTeacher.open(teacher_folder)
    documents = list(shards.train.rows(np.arange(4)))
    with TargetStore.create(path, teacher.identity.as_json(), 8, (1.0,), vocab_size=270) as made:
        scored = teacher.score(documents, k=8, temperatures=(1.0,))
        made.put_many((documents[number], rows) for number, rows in scored)
    return path


def checked(store: Path, folder: Path | None = None, k: int = 8) -> Report:
    return check_teacher(TeacherSpec(backend="store", store=str(store)), folder, {}, k=k)


def test_a_sound_store_passes_and_says_what_it_holds(store: Path, teacher_folder: Path) -> None:
    report = checked(store, teacher_folder)
    assert int(report.code) == 0, report.lines()
    assert "4 rows read, none damaged: k = 8, T = 1" in report.findings[-1].said
    assert {one.name: one.probed for one in report.abilities}["score"] is True


def test_what_a_store_cannot_answer_is_a_failed_check(store: Path, teacher_folder: Path, tmp_path: Path) -> None:
    assert "at most 8 entries" in checked(store, k=9).findings[-1].said
    other = tmp_path / "other"
    shutil.copytree(teacher_folder, other)
    with (other / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert checked(store, other).kind == "wrong-ids"
    with sqlite3.connect(store) as damaged:
        damaged.execute("UPDATE rows SET value = zeroblob(length(value)) WHERE rowid = 1")
    report = checked(store)
    assert (int(report.code), "1 of 4 rows are damaged" in report.findings[-1].said) == (1, True)
    assert "--drop" in str(report.findings[-1].next)
    with sqlite3.connect(store) as emptied:
        emptied.execute("DELETE FROM rows")
    assert "holds no rows" in checked(store).findings[-1].said
