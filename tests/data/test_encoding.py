"""Ids found word by word are the library's own, whatever the text."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from latentforge.data import encoding, words
from latentforge.data.cutting import END, RULES, Cutter
from latentforge.data.encoding import WordEncoder, encode_all, why_not
from latentforge.errors import RefusedError

GPT2, QWEN, LLAMA3 = RULES
LEARNT = [
    "def grüße(self, other):\n    return self.x + other.x  # it's what we'll add\n\n",
    "class Foo:\r\n\r\n\tvalue = 12345.678\t\n  日本語の文章です。 Они сказали, что I'VE  don't 'S\n",
    'if (a[0] != b[1]) {\n\n    printf("%d\\n", x);\n}\n' * 3,
]
# Where the patterns' alternatives meet, and what Unicode does to those who trust their own tables: other blanks, a
# letter that folds to s, marks alone and composed, a Hangul syllable in parts, characters of the newest versions, NUL.
HOSTILE = [
    *(" ", "  ", "\n", "\r", "\t", "\x0b", "\x1c", "\x1f", "\x85", "\xa0", "\u180e", "\u200b", "\u2028", "\u3000"),
    *(
        "'",
        "'s",
        "'S",
        "'\u017f",
        "'ll",
        "'lL",
        "'re",
        "'ve",
        "'m",
        "'d",
        "'t",
        "s",
        "x",
        "K",
        "é",
        "e\u0301",
        "\u0301",
    ),
    *(
        "\u0301",
        "1",
        "23",
        "4567",
        "½",
        "٣",
        "Ⅷ",
        "!",
        "((",
        "…",
        "日本",
        "\u1112\u1161\u11ab",
        "\ud55c",
        "\u0958",
        "\u212b",
    ),
    *("\U00016d68", "\U0001e5d0", "\U000323b0", "\U0001f9d1\u200d\U0001f680", "\x00", "\ufeff", "\uffff", "\U0010ffff"),
    *("<|end|>", "<|e", "<think>", "</think>", "<think", "<thinking>", "<|end|><think>"),
]
hostile_texts = st.lists(
    st.lists(st.sampled_from(HOSTILE) | st.text(st.characters(codec="utf-8"), max_size=3), max_size=12).map("".join),
    max_size=6,
)


def byte_level(pattern: str, *, nfc: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    if nfc:
        backend.normalizer = normalizers.NFC()
    if pattern == GPT2:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        LEARNT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(["<|end|>", "<|e"])
    backend.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in ("<think>", "<thinking>", "</think>")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", backend.token_to_id("<|end|>"))]
    )
    backend.encode_special_tokens = True
    return backend


BACKENDS = {
    "gpt2": byte_level(GPT2, nfc=False),
    "qwen": byte_level(QWEN, nfc=True),
    "llama3": byte_level(LLAMA3, nfc=False),
}
each_kind = pytest.mark.parametrize("kind", BACKENDS)
ENCODERS = {kind: WordEncoder(backend) for kind, backend in BACKENDS.items()}


def agrees(kind: str, texts: list[str], encoder: WordEncoder | None = None) -> None:
    mine = list((encoder or ENCODERS[kind])(texts))
    theirs = BACKENDS[kind].encode_batch(texts, add_special_tokens=False)
    assert [(size, ids.tolist()) for size, ids in mine] == [
        (len(text.encode()), one.ids) for text, one in zip(texts, theirs, strict=True)
    ]


@each_kind
@given(texts=hostile_texts)
def test_every_text_gets_the_ids_that_the_library_gives(kind: str, texts: list[str]) -> None:
    agrees(kind, texts)


def cut_as_the_library_cuts(pattern: str, texts: Iterable[str]) -> None:
    cutter = Cutter(RULES[pattern])
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    for text in texts:
        classes = cutter.classes(text + "\0", (text + "\0").encode())
        classes[-1] = END
        begin = cutter.words(classes).tolist()
        assert begin[:-1] == [start for _, (start, _) in split.pre_tokenize_str(text)], text[:20]


@pytest.mark.parametrize("pattern", RULES, ids=BACKENDS)
def test_all_that_the_patterns_tell_apart_is_told_apart_in_every_order(pattern: str) -> None:
    # One of each sort, in all orders of up to four: the alternatives depend on what stands beside what.
    sorts = [" ", "\n", "\t", "'", "s", "x", "1", "!"]
    orders = itertools.chain.from_iterable(itertools.product(sorts, repeat=n) for n in range(1, 5))
    cut_as_the_library_cuts(pattern, map("".join, orders))


@pytest.mark.parametrize("pattern", RULES, ids=BACKENDS)
@given(text=st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=20).map("".join))
def test_hostile_text_is_cut_as_the_library_cuts_it(pattern: str, text: str) -> None:
    cut_as_the_library_cuts(pattern, [text])


@pytest.mark.parametrize("pattern", [GPT2, QWEN], ids=["gpt2", "qwen"])
def test_every_character_of_unicode_is_cut_as_the_library_cuts_it(pattern: str) -> None:
    # The two planes with scripts in them whole, of the others each thousandth character.
    points = itertools.chain(range(0xD800), range(0xE000, 0x20000), range(0x20000, 0x110000, 997))
    every = [chr(point) for point in points]
    blocks = (every[at : at + 4096] for at in range(0, len(every), 4096))
    cut_as_the_library_cuts(pattern, ("".join(f"'{one}x \n{one} 1{one}\t" for one in some) for some in blocks))


def test_text_of_composed_characters_is_what_nfc_makes_of_it() -> None:
    known = [chr(point) for point in range(0x3000, 0x110000) if encoding._COMPOSED.fullmatch(chr(point))]
    known += [chr(point) for point in range(0x3000) if encoding._COMPOSED.fullmatch(chr(point))]
    generator, nfc = random.Random(0), normalizers.NFC()
    for _ in range(4):
        generator.shuffle(known)
        text = "".join(known)
        assert nfc.normalize_str(text) == text


@each_kind
def test_a_document_longer_than_a_window_is_cut_where_no_word_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_WINDOW_CHARACTERS", (5, 20))
    generator = random.Random(1)
    agrees(kind, ["".join(generator.choices([*HOSTILE, "word", " word"], k=n)) for n in range(0, 300, 7)])


@each_kind
def test_forgetting_words_changes_no_id(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_WORDS", 50)
    monkeypatch.setattr(words, "_SLOTS_BITS", 4)
    monkeypatch.setattr(encoding, "_WINDOW_CHARACTERS", (64, 64))
    generator = random.Random(2)
    texts = ["".join(generator.choices(HOSTILE + [f" word{n}" for n in range(200)], k=30)) for _ in range(60)]
    agrees(kind, texts, WordEncoder(BACKENDS[kind]))


def test_words_longer_than_the_table_holds_are_told_apart() -> None:
    stems = ["a" * n for n in range(12, 20)]
    texts = [f"{stem}{end}" for stem in stems for end in ("b", "c", "bb", "\0", "\0\0", "")]
    for _ in range(2):  # asked of the model, then remembered
        agrees("qwen", texts)


def altered(**parts: object) -> tokenizers.Tokenizer:
    backend = byte_level(QWEN, nfc=False)
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


def with_added(token: AddedToken) -> tokenizers.Tokenizer:
    backend = byte_level(QWEN, nfc=False)
    backend.add_tokens([token])
    return backend


OTHERS = {
    "it takes quoted special tokens": altered(encode_special_tokens=False),
    "its normalizer is Lowercase": altered(normalizer=normalizers.Lowercase()),
    "the pattern of its pre-tokenizer": altered(
        pre_tokenizer=pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\w+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
    "pre-tokenizer is none": altered(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "its added token '<x>'": with_added(AddedToken("<x>", special=False, lstrip=True, normalized=False)),
    "its added token 'yes'": with_added(AddedToken("yes", special=False, single_word=True, normalized=False)),
    "its model is WordLevel": altered(model=models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")),
}


@pytest.mark.parametrize("said", OTHERS)
def test_a_tokenizer_whose_words_are_not_encoded_by_themselves_is_told_why(said: str) -> None:
    assert said.split()[0] in (why_not(OTHERS[said]) or "")
    with pytest.raises(RefusedError, match=said.split()[-1]):
        WordEncoder(OTHERS[said])


@given(texts=hostile_texts)
def test_the_librarys_own_way_gives_every_text_its_ids(texts: list[str]) -> None:
    backend = OTHERS["its added token '<x>'"]
    found = [ids.tolist() for _, ids in encode_all(backend, texts)]
    assert found == [one.ids for one in backend.encode_batch(texts, add_special_tokens=False)]
    assert all(ids.dtype == np.uint32 for _, ids in encode_all(backend, texts))
