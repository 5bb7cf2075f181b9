"""One id means one token on both sides, or the first difference is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentforge.data import ShardSet
from latentforge.data.tokenizer import train_bpe
from latentforge.errors import RefusedError
from latentforge.teachers.alignment import compare_vocabularies


@pytest.fixture
def other(shards: ShardSet, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards.tokenizer_dir, tmp_path / "tokenizer"))


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads((folder / "tokenizer.json").read_text())
    change(value)
    (folder / "tokenizer.json").write_text(json.dumps(value))


def refusal(teacher: Path, student: Path) -> str:
    with pytest.raises(RefusedError) as caught:
        compare_vocabularies(teacher, student)
    return str(caught.value)


def test_equal_vocabularies_agree(shards: ShardSet, other: Path) -> None:
    alignment = compare_vocabularies(shards.tokenizer_dir, other)
    assert (alignment.tokens, alignment.notes) == (270, ())


@pytest.mark.parametrize(("low", "high"), [(1, 2), (50, 269), (0, 1)])
def test_one_swapped_pair_is_refused_with_the_first_index(shards: ShardSet, other: Path, low: int, high: int) -> None:
    def swap(value: dict[str, Any]) -> None:
        vocabulary = value["model"]["vocab"]
        by_id = {number: text for text, number in vocabulary.items()}
        vocabulary[by_id[low]], vocabulary[by_id[high]] = high, low
        for token in value["added_tokens"]:
            token["id"] = vocabulary[token["content"]]

    edit(other, swap)
    said = refusal(shards.tokenizer_dir, other)
    assert f"differ first at id {low}:" in said
    assert said.count("270 tokens") == 2


def test_two_tokens_of_one_id_are_refused_and_chance_does_not_choose_between_them(
    shards: ShardSet, other: Path
) -> None:
    edit(other, lambda value: value["model"]["vocab"].update(zz=269, aa=269))
    for teacher, student in ((shards.tokenizer_dir, other), (other, shards.tokenizer_dir), (other, other)):
        assert "have one id, 269" in refusal(teacher, student)


def test_a_tokenizer_that_drops_merges_at_random_is_refused(other: Path) -> None:
    edit(other, lambda value: value["model"].update(dropout=0.5))
    assert "drops merges at random (dropout = 0.5)" in refusal(other, other)
    edit(other, lambda value: value["model"].update(dropout=0.0))
    compare_vocabularies(other, other)


def test_a_token_that_only_one_side_has_is_refused(shards: ShardSet, other: Path) -> None:
    def add(value: dict[str, Any]) -> None:
        value["added_tokens"].append({**value["added_tokens"][0], "id": 270, "content": "<extra>"})

    edit(other, add)
    assert "at id 270: teacher has none (270 tokens), student has '<extra>' (271 tokens)" in refusal(
        shards.tokenizer_dir, other
    )
    assert "at id 270: teacher has '<extra>' (271 tokens), student has none" in refusal(other, shards.tokenizer_dir)


def test_another_tokenizer_of_the_same_size_is_refused(shards: ShardSet, tmp_path: Path) -> None:
    train_bpe(["quite another text, about quite other things, quoting others"] * 3, 270, tmp_path)
    assert "differ first at id" in refusal(shards.tokenizer_dir, tmp_path)


def test_padding_rows_are_said(shards: ShardSet, make_model: Callable[..., Any], tmp_path: Path) -> None:
    make_model(tmp_path / "m", rows=288)
    alignment = compare_vocabularies(tmp_path / "m", shards.tokenizer_dir)
    assert (alignment.teacher_rows, alignment.student_rows) == (288, None)
    assert alignment.notes == ("teacher has 288 embedding rows for 270 tokens: 18 padding rows are masked",)


def test_fewer_embedding_rows_than_tokens_are_refused(
    shards: ShardSet, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    make_model(tmp_path / "m", rows=269)
    assert "has 269 embedding rows for 270 tokens" in refusal(tmp_path / "m", shards.tokenizer_dir)
    assert "student" in refusal(shards.tokenizer_dir, tmp_path / "m")


def test_a_folder_without_tokenizer_is_refused(shards: ShardSet, tmp_path: Path) -> None:
    assert "has no tokenizer.json" in refusal(tmp_path, shards.tokenizer_dir)
