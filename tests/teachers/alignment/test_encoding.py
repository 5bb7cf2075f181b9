"""Equal vocabularies are not enough: flags, roles and what a text becomes are compared, and BOS is never silent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentforge.data import ShardSet, build_shards
from latentforge.data.special import bos_of, special_tokens
from latentforge.errors import RefusedError
from latentforge.teachers.alignment import compare_vocabularies

Edit = Callable[[dict[str, Any]], None]
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"String": "h"}, "behavior": "Isolated", "invert": False}


@pytest.fixture
def pair(shards: ShardSet, tmp_path: Path) -> tuple[Path, Path]:
    """Two copies of one tokenizer: a teacher's and a student's."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    for folder in (teacher, student):
        shutil.copytree(shards.tokenizer_dir, folder)
    return teacher, student


def edit(file: Path, change: Edit) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def refusal(teacher: Path, student: Path) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        compare_vocabularies(teacher, student)
    return caught.value


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("normalizer", lambda v: v.update(normalizer={"type": "Lowercase"})),
        ("normalizer", lambda v: v.update(normalizer={"type": "NFKC"})),
        ("pre_tokenizer", lambda v: v["pre_tokenizer"].update(add_prefix_space=True)),
        ("pre_tokenizer", lambda v: v.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT, BYTES]})),
        ("model.merges", lambda v: v["model"].update(merges=v["model"]["merges"][::-1])),
    ],
    ids=["lowercase", "nfkc", "prefix-space", "split", "merges-reversed"],
)
def test_equal_token_lists_that_make_other_ids_of_a_text_are_refused(
    pair: tuple[Path, Path], part: str, change: Edit
) -> None:
    edit(pair[1] / "tokenizer.json", change)
    said = str(refusal(*pair))
    assert "the same text gives other ids" in said
    assert f"tokenizer.json differs in {part}" in said


def test_a_difference_that_no_text_shows_is_said(pair: tuple[Path, Path]) -> None:
    edit(pair[1] / "tokenizer.json", lambda v: v["model"].update(byte_fallback=True))
    (note,) = compare_vocabularies(*pair).notes
    assert "model.byte_fallback is written otherwise" in note


@pytest.mark.parametrize("flag", ["special", "normalized", "lstrip", "rstrip", "single_word"])
def test_an_added_token_with_another_flag_is_refused(pair: tuple[Path, Path], flag: str) -> None:
    edit(pair[1] / "tokenizer.json", lambda v: v["added_tokens"][0].update({flag: not v["added_tokens"][0][flag]}))
    said = str(refusal(*pair))
    assert "added token 0 ('<|endoftext|>')" in said
    assert f"{flag} = " in said


def test_an_added_token_of_one_side_alone_is_refused(pair: tuple[Path, Path]) -> None:
    def add(value: dict[str, Any]) -> None:
        token = next(text for text, number in value["model"]["vocab"].items() if number == 260)
        value["added_tokens"].append({**value["added_tokens"][0], "id": 260, "content": token})

    edit(pair[1] / "tokenizer.json", add)
    assert "token 260" in str(refusal(*pair))
    assert "an added token of the student alone" in str(refusal(*pair))


def with_bos(folder: Path, *, by_itself: bool) -> int:
    """Make token 269 a BOS, put before each text by the post-processor or not."""

    def change(value: dict[str, Any]) -> None:
        token = next(text for text, number in value["model"]["vocab"].items() if number == 269)
        assert value["model"]["merges"].pop()  # the last merge made the last token
        del value["model"]["vocab"][token]
        value["model"]["vocab"]["<s>"] = 269
        value["added_tokens"].append({**value["added_tokens"][0], "id": 269, "content": "<s>"})
        if by_itself:
            value["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [269], "tokens": ["<s>"]}},
            }

    edit(folder / "tokenizer.json", change)
    edit(folder / "tokenizer_config.json", lambda v: v.update(bos_token="<s>"))
    return 269


def test_another_end_of_text_is_refused_with_the_token_to_set(pair: tuple[Path, Path]) -> None:
    for folder in pair:
        with_bos(folder, by_itself=False)
    edit(pair[1] / "tokenizer_config.json", lambda v: v.update(eos_token="<s>"))
    error = refusal(*pair)
    assert "ends a document with '<|endoftext|>' (id 0), the student with '<s>' (id 269)" in str(error)
    assert error.next == "set eos_token of the student's tokenizer_config.json to '<|endoftext|>'"


def test_a_bos_that_only_one_side_adds_by_itself_is_refused(pair: tuple[Path, Path]) -> None:
    with_bos(pair[0], by_itself=False)
    with_bos(pair[1], by_itself=False)
    edit(pair[0] / "tokenizer_config.json", lambda v: v.update(add_bos_token=True))
    assert "teacher's tokenizer puts ids [269] … [], the student's [] … []" in str(refusal(*pair))


def test_another_padding_token_and_chat_template_are_said(pair: tuple[Path, Path]) -> None:
    edit(pair[1] / "tokenizer_config.json", lambda v: v.update(pad_token="<|endoftext|>"))
    (pair[0] / "chat_template.jinja").write_text("{{ messages }}")
    pad, template = compare_vocabularies(*pair).notes
    assert pad.startswith("pad_token: teacher none, student '<|endoftext|>' (id 0)")
    assert template.startswith("chat template: teacher sha256 ")


@pytest.mark.parametrize("how", ["post-processor", "add_bos_token"])
def test_a_bos_that_a_server_would_add_in_silence_is_refused_until_it_is_asked_for(
    pair: tuple[Path, Path], how: str
) -> None:
    folder = pair[0]
    with_bos(folder, by_itself=how == "post-processor")
    if how == "add_bos_token":
        edit(folder / "tokenizer_config.json", lambda v: v.update(add_bos_token=True))
    assert special_tokens(folder).before == (269,)
    with pytest.raises(RefusedError, match=r"data.bos = 'none': .* puts '<s>' \(id 269\) before each text") as caught:
        bos_of(folder, "none")
    assert caught.value.next == "set data.bos = 'add'"
    assert bos_of(folder, "add") == 269


def test_a_bos_is_not_invented(pair: tuple[Path, Path]) -> None:
    assert bos_of(pair[0], "none") is None
    with pytest.raises(RefusedError, match="names no bos_token"):
        bos_of(pair[0], "add")


def test_documents_begin_with_the_bos_that_was_asked_for(pair: tuple[Path, Path], tmp_path: Path) -> None:
    bos = with_bos(pair[0], by_itself=True)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(64):
        (corpus / f"{number}.txt").write_text(f"{number} the other import")

    def build(rule: Any) -> ShardSet:
        return build_shards(
            corpus,
            tmp_path / rule,
            vocab_size=270,
            sequence_length=8,
            train_sequences=8,
            heldout_sequences=1,
            tokenizer_folder=pair[0],
            bos=rule,
        )

    data = build("add")
    stream = data.train.rows(np.arange(len(data.train))).reshape(-1)
    assert stream[0] == bos
    ends = np.flatnonzero(stream[:-1] == data.eos_id)
    assert len(ends)
    assert (stream[ends + 1] == bos).all()
    assert (stream == bos).sum() == len(ends) + 1
    assert data.record["bos_id"] == bos
    with pytest.raises(RefusedError, match=r"data\.bos = 'none'"):
        build("none")
