"""Text as it comes: whole characters, and in the end all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

from latentforge.data.tokenizer import train_bpe
from latentforge.students.latent.text import TextStream

TEXT = "naïve 日本語 🎉 — the cat\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return train_bpe(["the cat"] * 3, 260, folder).backend  # other letters are a token a byte


def ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("chunk", [1, 2, 4, 8])
def test_no_piece_holds_a_part_of_a_character(tokenizer: tokenizers.Tokenizer, chunk: int) -> None:
    tokens, stream = ids(tokenizer, TEXT), TextStream(tokenizer)
    pieces = [stream.push(tokens[at : at + chunk]) for at in range(0, len(tokens), chunk)]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.end() == TEXT
    assert sum(map(bool, pieces)) > 1


def test_a_prompt_is_not_said_again_wherever_it_is_cut(tokenizer: tokenizers.Tokenizer) -> None:
    tokens = ids(tokenizer, TEXT)
    for cut in range(len(tokens)):
        stream = TextStream(tokenizer, tokens[:cut])
        whole = tokenizer.decode(tokens[:cut]).rstrip("\ufffd")
        assert whole + stream.push(tokens[cut:]) + stream.end() == TEXT


def test_bytes_that_make_no_character_are_said_at_the_end_and_once(tokenizer: tokenizers.Tokenizer) -> None:
    tokens, stream = ids(tokenizer, "ab🎉"), TextStream(tokenizer)
    assert stream.push(tokens[:-1]) == "ab"
    assert stream.end() == "\ufffd"
    assert stream.end() == ""


def test_the_end_of_a_text_has_no_letters(tokenizer: tokenizers.Tokenizer) -> None:
    stream = TextStream(tokenizer)
    assert stream.push([*ids(tokenizer, "ab"), 0]) + stream.end() == "ab"
