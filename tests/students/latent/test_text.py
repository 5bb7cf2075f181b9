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


@pytest.fixture(scope="module")
def by_bytes() -> tokenizers.Tokenizer:
    """As SentencePiece's are: blanks as U+2581, a token for each byte, runs of which are decoded together."""
    pieces = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁", "cat", "日", "\ufffd"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    decoders = tokenizers.decoders
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    found.add_special_tokens(["<s>"])
    return found


@pytest.mark.parametrize("cut", range(9))
def test_bytes_that_make_no_character_end_no_stream_whatever_was_said_before(
    by_bytes: tokenizers.Tokenizer, cut: int
) -> None:
    """An "é" by its bytes is said; one more byte, and the decoder says three times U+FFFD for all of them."""
    vocabulary = by_bytes.get_vocab()
    names = ["▁the", "<0xC3>", "<0xA9>", "<0xFF>", "cat", "<s>", "▁the", "<0xE6>"]
    parts = ["the", "", "é", "", "\ufffdcat", "", " the", "", "\ufffd"]
    tokens = [vocabulary[name] for name in names]
    if cut in (4, 8):  # the byte is the prompt's
        parts[cut] = parts[cut].removeprefix("\ufffd")
    stream = TextStream(by_bytes, tokens[:cut])
    assert [stream.push([token]) for token in tokens[cut:]] + [stream.end()] == parts[cut:]


@pytest.mark.parametrize("after", ["cat", "日", "<0x41>"])
def test_what_a_prompt_ends_with_is_not_said_again(by_bytes: tokenizers.Tokenizer, after: str) -> None:
    """A U+FFFD of its own is held back as the beginning of a character is."""
    vocabulary = by_bytes.get_vocab()
    stream = TextStream(by_bytes, [vocabulary["▁the"], vocabulary["▁"], vocabulary["\ufffd"]])
    assert stream.push([vocabulary[after]]) + stream.end() == ("A" if after == "<0x41>" else after)


def test_a_prompt_that_ends_inside_a_token_of_several_characters_is_not_said_again() -> None:
    """Its ids may: the characters of a token that are whole are the prompt's."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    both = tokenizers.Tokenizer(tokenizers.models.BPE())
    both.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    both.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=259, initial_alphabet=alphabet, show_progress=False)
    both.train_from_iterator(["日é", "日è", "日ê"] * 9, trainer)  # learns the bytes of 日 and the first of é
    whole = both.encode("日é").ids
    assert len(whole) == 2
    stream = TextStream(both, whole[:1])
    assert stream.push(whole[1:]) + stream.end() == "é"
