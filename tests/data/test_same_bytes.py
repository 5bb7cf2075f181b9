"""Data runs of before and of now have the same rows: digests that were recorded before corpora were streamed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from latentforge.data import build_shards
from latentforge.evidence.digests import file_sha256

SAID = (
    "def return self.value_of(x) the teacher's they'LL grüße e\u0301te\u0301 日本語の文章 1234567 3.14 \t \n\n    \r\n "
    "!!= </think> <|endoftext|> — «да» ½ \u1112\u1161\u11ab naïve foo_bar // it's \u3000 ok"
)
WORDS = SAID.split(" ")
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def text(number: int) -> str:
    """A text that depends on its number alone, from 1 to about 900 words."""
    state, found = number + 1, []
    for _ in range(1 + number * 7919 % 900):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        found.append(WORDS[(state >> 33) % len(WORDS)])
    return f"{number} " + " ".join(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        path = root / f"{number % 7}" / f"{number}{('.txt', '.md', '.py')[number % 3]}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(("\ufeff" if number == 5 else "") + text(number), encoding="utf-8", newline="")
    lines = (json.dumps({"text": text(n), "id": n}, ensure_ascii=n % 2 == 0) for n in range(60, 260))
    (root / "lines.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (root / "blank.txt").write_text(" \n")
    return root


@pytest.fixture(scope="module")
def lone_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lone") / "a.txt"
    path.write_text("\n\n".join(text(n) for n in range(200)), encoding="utf-8", newline="")
    return path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([text(n) for n in range(40)], trainer)
    backend.add_special_tokens(["<|endoftext|>", "<|begin|>"])
    backend.add_tokens([AddedToken(one, special=False, normalized=False) for one in ("<think>", "</think>")])
    begin = backend.token_to_id("<|begin|>")
    backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    root = tmp_path_factory.mktemp("qwen")
    backend.save(str(root / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "bos_token": "<|begin|>"}
    (root / "tokenizer_config.json").write_text(json.dumps(config))
    return root


RECORDED = {
    "folder": {
        "train.bin": "2b80257af17d8ca2",
        "heldout.bin": "0eebd2b401573e40",
        "corpus.jsonl": "1b4ca22765ac077a",
        "data.json": "ea4fea045123264d",
        "tokenizer/tokenizer.json": "93f14df9bf00cc96",
    },
    "folder, chunk 4": {
        "train.bin": "a4e97b5fef7c32d7",
        "heldout.bin": "0eebd2b401573e40",
        "corpus.jsonl": "1b4ca22765ac077a",
        "data.json": "5d3e1f7b65a03cc9",
        "tokenizer/tokenizer.json": "93f14df9bf00cc96",
    },
    "folder, first rows": {
        "train.bin": "c59c9db61f52bc73",
        "heldout.bin": "0eebd2b401573e40",
        "corpus.jsonl": "e06993b7445a74be",
        "data.json": "abc96a5909dcc4e8",
        "tokenizer/tokenizer.json": "93f14df9bf00cc96",
    },
    "folder, qwen": {
        "train.bin": "7dce1b073638f52c",
        "heldout.bin": "ff0b1afe7daccba6",
        "corpus.jsonl": "1b4ca22765ac077a",
        "data.json": "4cd04bff53556c22",
        "tokenizer/tokenizer.json": "0a9074647999f724",
    },
    "lone text": {
        "train.bin": "e1cb13fb588847af",
        "heldout.bin": "0632781d9f4c535f",
        "corpus.jsonl": "2ae3a09af7416f9a",
        "data.json": "07f26965159b579a",
        "tokenizer/tokenizer.json": "e6f4722ea70b0a5a",
    },
}


@pytest.mark.parametrize("case", ["folder", "folder, chunk 4", "folder, first rows", "folder, qwen", "lone text"])
def test_the_rows_are_those_of_before(case: str, folder: Path, lone_text: Path, qwen: Path, tmp_path: Path) -> None:
    asked: dict[str, object] = {
        "vocab_size": 600, "sequence_length": 32, "train_sequences": None, "heldout_sequences": 40
    }  # fmt: skip
    if case == "folder, chunk 4":
        asked["chunk"] = 4
    if case == "folder, first rows":
        asked["train_sequences"] = 100
    if case == "folder, qwen":
        asked |= {"tokenizer_folder": qwen, "bos": "add"}
    shards = build_shards(lone_text if case == "lone text" else folder, tmp_path, **asked)  # type: ignore[arg-type]
    names = ("train.bin", "heldout.bin", "corpus.jsonl", "data.json", "tokenizer/tokenizer.json")
    assert {name: file_sha256(tmp_path / name)[:16] for name in names} == RECORDED[case]
    assert len(shards.train) > 50
