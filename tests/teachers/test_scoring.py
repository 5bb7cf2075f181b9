"""The run kinds ``data`` and ``score``: whole products or a refusal, resumable, never off by a position."""

from __future__ import annotations

import io
import itertools
import json
import math
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentforge.data import ShardSet
from latentforge.errors import FailedError, LatentForgeError, RefusedError
from latentforge.events import EventLog, read_events
from latentforge.evidence.digests import tree_sha256
from latentforge.spec.identity import RunIdentity
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.spec.sections import DataSpec, ScoreSpec
from latentforge.targets import SequenceTargets, TargetStore
from latentforge.targets.topk import sequence_rows
from latentforge.teachers import scoring
from latentforge.teachers.hf import HFTeacher
from latentforge.teachers.scoring import check_agreement, coverage, score_all
from latentforge.train import data as data_recipe
from latentforge.train import score as score_recipe

MakeRun = Callable[..., RunDir]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run(kind, section, attempt=1, predecessor=None, **resolved)`` makes a run folder as the agent would."""

    def make(
        kind: Any, section: dict[str, Any], *, attempt: int = 1, predecessor: str | None = None, **resolved: Any
    ) -> RunDir:
        named = {
            name: f"run:{ref['run']}" if "run" in ref else f"sha256:{ref['sha256']}" if "sha256" in ref else "stdlib"
            for name, ref in resolved.items()
        }
        identity = RunIdentity(kind, {"seed": 7, kind: section}, named, code="0" * 64, lock="0" * 64, attempt=attempt)
        launch = LaunchRecord(identity.run_id, "kin", resolved, predecessor=predecessor)
        (tmp_path / "runs").mkdir(exist_ok=True)
        return RunDir.create(tmp_path / "runs", identity, launch)

    return make


@pytest.fixture
def data_run(make_run: MakeRun, shards: ShardSet) -> RunDir:
    run = make_run("data", DataSpec().model_dump(mode="json"), corpus={"builtin": "stdlib"})
    shutil.copytree(shards.folder, run.out)
    return run


def score_run(make_run: MakeRun, data_run: RunDir, teacher: Path, *, attempt: int = 1, **section: Any) -> RunDir:
    asked = ScoreSpec(**{"k": 8, "temperatures": (1.0, 2.0), "batch_size": 4, **section}).model_dump(mode="json")
    ref = {"path": str(teacher), "sha256": tree_sha256(teacher)}
    return make_run("score", asked, attempt=attempt, data={"run": data_run.run}, teacher=ref)


def execute(recipe: Any, run: RunDir) -> str:
    text = io.StringIO()
    with EventLog(run.events_file, run.run, text=text) as log:
        recipe.run(run, log)
    return text.getvalue()


def rows_of(run: RunDir) -> list[tuple[bytes, bytes]]:
    connection = sqlite3.connect(f"file:{run.out / 'targets.sqlite'}?immutable=1", uri=True)
    rows = connection.execute("SELECT key, value FROM rows ORDER BY key").fetchall()
    connection.close()
    return rows


def test_a_score_run_covers_all_rows_and_leaves_one_closed_file(
    make_run: MakeRun, data_run: RunDir, teacher_folder: Path, shards: ShardSet
) -> None:
    run = score_run(make_run, data_run, teacher_folder)
    said = execute(score_recipe, run)
    assert "coverage 100.0 % (46 of 46 sequences)" in said
    assert sorted(p.name for p in run.out.iterdir()) == ["score.json", "targets.sqlite"]
    record = json.loads((run.out / "score.json").read_text())
    assert (record["rows"], record["new_rows"], record["k"], record["temperatures"]) == (46, 46, 8, [1.0, 2.0])
    assert record["identity"] == HFTeacher.open(teacher_folder).identity.as_json()
    assert 0.0 < record["tail_mass"]["1"] < record["tail_mass"]["2"] < 1.0
    assert record["agreement"]["worst_nats"] < 1e-4
    assert record["bytes"] == (run.out / "targets.sqlite").stat().st_size
    phases = [e.fields["name"] for e in read_events(run.events_file) if e.fields.get("state") == "end"]
    assert phases == ["load", "score", "verify"]
    progress = [e.fields for e in read_events(run.events_file) if e.fields.get("state") == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] == 46


def test_a_stopped_score_run_resumes_and_asks_only_for_what_is_missing(
    make_run: MakeRun, data_run: RunDir, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = score_run(make_run, data_run, teacher_folder, attempt=9)
    execute(score_recipe, whole)
    first = score_run(make_run, data_run, teacher_folder)
    monkeypatch.setattr(scoring, "_COMMIT_ROWS", 4)
    topk, calls = HFTeacher.topk, []

    def dies(self: HFTeacher, tokens: torch.Tensor, **asked: Any) -> Any:
        calls.append(len(tokens))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return topk(self, tokens, **asked)

    monkeypatch.setattr(HFTeacher, "topk", dies)
    with pytest.raises(KeyboardInterrupt):
        execute(score_recipe, first)
    assert not (first.out / "score.json").exists(), "an unfinished run has no product"
    monkeypatch.setattr(HFTeacher, "topk", topk)

    ref = first.load_launch().resolved
    second = make_run("score", first.load_identity().spec["score"], attempt=2, predecessor=first.run, **ref)
    before = tree_sha256(first.out)
    said = execute(score_recipe, second)
    assert f"takes over the store of {first.run}" in said
    assert "resumes: 43.4 % (20 of 46 sequences)" in said
    assert json.loads((second.out / "score.json").read_text())["new_rows"] == 26
    assert tree_sha256(first.out) == before, "the earlier attempt stays as it was"
    assert rows_of(second) == rows_of(whole), "as if it had never stopped"
    assert sorted(p.name for p in second.out.iterdir()) == ["score.json", "targets.sqlite"]


def test_rows_still_in_the_journal_of_a_killed_attempt_are_taken_over(
    make_run: MakeRun, data_run: RunDir, teacher_folder: Path, shards: ShardSet
) -> None:
    first = score_run(make_run, data_run, teacher_folder)
    teacher = HFTeacher.open(teacher_folder)
    first.out.mkdir()
    store = TargetStore.create(
        first.out / "targets.sqlite", teacher.identity.as_json(), 8, (1.0, 2.0), vocab_size=teacher.vocab_size
    )
    score_all(teacher, shards, store, batch_size=8)
    assert (first.out / "targets.sqlite-wal").stat().st_size > 0, "not closed, as after kill -9"
    ref = first.load_launch().resolved
    second = make_run("score", first.load_identity().spec["score"], attempt=2, predecessor=first.run, **ref)
    assert "resumes: 100.0 % (46 of 46 sequences)" in execute(score_recipe, second)
    store.close()


def test_damaged_rows_of_an_earlier_attempt_are_scored_again(
    make_run: MakeRun, data_run: RunDir, teacher_folder: Path, shards: ShardSet
) -> None:
    first = score_run(make_run, data_run, teacher_folder)
    execute(score_recipe, first)
    connection = sqlite3.connect(first.out / "targets.sqlite")
    with connection:
        connection.execute("UPDATE rows SET value = substr(value, 1, 60) WHERE rowid % 10 = 3")
    connection.close()
    ref = first.load_launch().resolved
    second = make_run("score", first.load_identity().spec["score"], attempt=2, predecessor=first.run, **ref)
    said = execute(score_recipe, second)
    assert "5 rows of" in said
    assert "resumes: 89.1 % (41 of 46 sequences)" in said
    assert json.loads((second.out / "score.json").read_text())["new_rows"] == 5
    teacher = HFTeacher.open(teacher_folder)
    with TargetStore.open(second.out / "targets.sqlite") as store:
        assert check_agreement(teacher, store, shards, sample=46).worst < 1e-4


@pytest.mark.parametrize("part", [0.0, 0.2, 0.8])
def test_an_earlier_store_that_cannot_be_read_is_left_behind(
    make_run: MakeRun, data_run: RunDir, teacher_folder: Path, part: float
) -> None:
    first = score_run(make_run, data_run, teacher_folder)
    execute(score_recipe, first)
    content = (first.out / "targets.sqlite").read_bytes()
    (first.out / "targets.sqlite").write_bytes(content[: int(len(content) * part)])
    ref = first.load_launch().resolved
    second = make_run("score", first.load_identity().spec["score"], attempt=2, predecessor=first.run, **ref)
    said = execute(score_recipe, second)
    assert f"the store of {first.run} is not taken over" in said
    assert "coverage 100.0 %" in said
    assert sorted(p.name for p in second.out.iterdir()) == ["score.json", "targets.sqlite"]


def test_an_attempt_that_stored_nothing_does_not_hide_the_one_before(
    make_run: MakeRun, data_run: RunDir, teacher_folder: Path
) -> None:
    first = score_run(make_run, data_run, teacher_folder)
    execute(score_recipe, first)
    spec, ref = first.load_identity().spec["score"], first.load_launch().resolved
    second = make_run("score", spec, attempt=2, predecessor=first.run, **ref)
    third = make_run("score", spec, attempt=3, predecessor=second.run, **ref)
    assert f"takes over the store of {first.run}" in execute(score_recipe, third)


def test_a_store_shifted_by_one_position_is_found(teacher_folder: Path, shards: ShardSet, tmp_path: Path) -> None:
    teacher = HFTeacher.open(teacher_folder)

    def filled(name: str, shift: int) -> TargetStore:
        store = TargetStore.create(tmp_path / name, teacher.identity.as_json(), 8, [1.0], vocab_size=270)
        for shard in (shards.train, shards.heldout):
            tokens = shard.rows(np.arange(len(shard)))
            rows = sequence_rows(
                *teacher.topk(torch.from_numpy(tokens), k=8, temperatures=(1.0,)), sequences=len(tokens)
            )
            shifted = [
                SequenceTargets(
                    np.roll(r.ids, shift, 0), np.roll(r.logprobs, shift, 0), {1.0: np.roll(r.tails[1.0], shift)}
                )
                for r in rows
            ]
            store.put_many(zip(tokens, shifted, strict=True))
        return store

    with filled("right.sqlite", 0) as store:
        assert coverage(store, shards).fraction == 1.0
        assert check_agreement(teacher, store, shards).worst < 1e-4
    for shift in (1, -1):
        with (
            filled(f"shifted {shift}.sqlite", shift) as store,
            pytest.raises(FailedError, match="stored targets differ from the teacher's own"),
        ):
            check_agreement(teacher, store, shards)


def test_a_teacher_whose_second_answer_is_no_number_does_not_agree_with_its_store(
    teacher_folder: Path, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = HFTeacher.open(teacher_folder)
    with TargetStore.create(tmp_path / "store.sqlite", teacher.identity.as_json(), 8, [1.0], vocab_size=270) as store:
        for shard in (shards.train, shards.heldout):
            tokens = shard.rows(np.arange(len(shard)))
            answers = teacher.topk(torch.from_numpy(tokens), k=8, temperatures=(1.0,))
            store.put_many(zip(tokens, sequence_rows(*answers, sequences=len(tokens)), strict=True))
        logits, asked = HFTeacher.logits, itertools.count()
        monkeypatch.setattr(
            HFTeacher, "logits", lambda self, tokens: logits(self, tokens) * (math.nan if next(asked) == 2 else 1.0)
        )
        with pytest.raises(FailedError, match="differ from the teacher's own by nan nats"):
            check_agreement(teacher, store, shards)


def test_a_teacher_that_answers_for_the_wrong_position_fails_the_run(
    make_run: MakeRun, data_run: RunDir, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topk = HFTeacher.topk

    def shifted(self: HFTeacher, tokens: torch.Tensor, **asked: Any) -> Any:
        ids, logprobs, tails = topk(self, tokens, **asked)
        return ids.roll(1, 0), logprobs.roll(1, 0), {t: tail.roll(1, 0) for t, tail in tails.items()}

    monkeypatch.setattr(HFTeacher, "topk", shifted)
    run = score_run(make_run, data_run, teacher_folder)
    with pytest.raises(FailedError, match="differ from the teacher's own"):
        execute(score_recipe, run)
    assert not (run.out / "score.json").exists()


def test_a_teacher_that_answers_nan_is_refused(
    make_run: MakeRun, data_run: RunDir, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = HFTeacher.logits
    monkeypatch.setattr(HFTeacher, "logits", lambda self, tokens, **w: logits(self, tokens, **w) * float("nan"))
    run = score_run(make_run, data_run, teacher_folder)
    with pytest.raises(RefusedError, match="not finite"):
        execute(score_recipe, run)


def test_a_k_larger_than_the_vocabulary_is_refused_before_anything_is_written(
    make_run: MakeRun, data_run: RunDir, teacher_folder: Path
) -> None:
    run = score_run(make_run, data_run, teacher_folder, k=271)
    with pytest.raises(RefusedError, match=r"score\.k = 271 is larger than the vocabulary \(270 tokens\)"):
        execute(score_recipe, run)
    assert not run.out.exists()


def test_a_teacher_with_another_vocabulary_is_refused(
    make_run: MakeRun, data_run: RunDir, teacher_folder: Path, tmp_path: Path
) -> None:
    teacher = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    value = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = value["model"]["vocab"]
    low, high = (next(text for text, number in vocabulary.items() if number == wanted) for wanted in (99, 100))
    vocabulary[low], vocabulary[high] = 100, 99
    (teacher / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(RefusedError, match="differ first at id 99"):
        execute(score_recipe, score_run(make_run, data_run, teacher))


def test_sequences_longer_than_the_teacher_are_refused(
    make_run: MakeRun, data_run: RunDir, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    make_model(tmp_path / "short", positions=8)
    with pytest.raises(RefusedError, match=r"sequence_length = 16 is longer than the teacher's 8 positions"):
        execute(score_recipe, score_run(make_run, data_run, tmp_path / "short"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_teacher_that_changed_since_it_was_planned_is_refused(
    make_run: MakeRun, data_run: RunDir, teacher_folder: Path, tmp_path: Path, name: str
) -> None:
    teacher = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    run = score_run(make_run, data_run, teacher)
    content = bytearray((teacher / name).read_bytes())
    content[-2] ^= 1
    (teacher / name).write_bytes(content)
    with pytest.raises(RefusedError, match=r"input 'teacher' .* changed since it was planned"):
        execute(score_recipe, run)


def test_altered_shards_are_refused_before_the_teacher_is_asked(
    make_run: MakeRun, data_run: RunDir, teacher_folder: Path
) -> None:
    run = score_run(make_run, data_run, teacher_folder)
    content = bytearray((data_run.out / "train.bin").read_bytes())
    content[7] ^= 1
    (data_run.out / "train.bin").write_bytes(content)
    with pytest.raises(RefusedError, match=r"train\.bin: sha256"):
        execute(score_recipe, run)
    assert not run.out.exists()


def data_spec(**changed: Any) -> dict[str, Any]:
    asked = {"vocab_size": 280, "sequence_length": 16, "train_sequences": 50, "heldout_sequences": 5}
    return DataSpec(**{**asked, **changed}).model_dump(mode="json")


def test_a_data_run_on_the_standard_library_makes_its_product(make_run: MakeRun) -> None:
    run = make_run("data", data_spec(), corpus={"builtin": "stdlib"})
    said = execute(data_recipe, run)
    assert "50 training and 5 held-out rows of 16 tokens, vocabulary 280" in said
    shards = ShardSet.open(run.out)
    assert (len(shards.train), len(shards.heldout)) == (50, 5)
    assert sorted(p.name for p in run.out.iterdir()) == [
        "corpus.jsonl",
        "data.json",
        "heldout.bin",
        "tokenizer",
        "train.bin",
    ]


def test_a_data_run_takes_the_teachers_tokenizer(make_run: MakeRun, teacher_folder: Path) -> None:
    ref = {"path": str(teacher_folder), "sha256": tree_sha256(teacher_folder)}
    run = make_run("data", data_spec(), corpus={"builtin": "stdlib"}, tokenizer=ref)
    execute(data_recipe, run)
    assert ShardSet.open(run.out).vocab_size == 270


def test_a_corpus_that_changed_since_it_was_planned_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "a"}\n')
    ref = {"path": str(corpus), "sha256": tree_sha256(corpus)}
    run = make_run("data", data_spec(corpus=f"sha256:{ref['sha256']}"), corpus=ref)
    corpus.write_text('{"text": "b"}\n')
    with pytest.raises(LatentForgeError, match=r"input 'corpus' .* changed since it was planned"):
        execute(data_recipe, run)
    assert not run.out.exists()
