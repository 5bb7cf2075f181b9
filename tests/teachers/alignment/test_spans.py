"""Two tokenizations of the same bytes: spans cover the same bytes, no token is in two, equal tokenizers give all."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from latentforge.data.pieces import TokenBytes
from latentforge.data.tokenizer import EOS, Tokenizer
from latentforge.errors import RefusedError
from latentforge.targets.row import SequenceTargets
from latentforge.teachers.crossing import Bridge
from latentforge.teachers.spans import align, boundaries

TEXTS = st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=24), min_size=1, max_size=6)
WORDS = st.lists(
    st.sampled_from(["the", " other", "re", "tur", "né", "日本", "😀", "  ", "\n", "1", "23"]), max_size=30
)


def bpe(folder: Path, texts: list[str], merges: int, *, words: bool) -> Tokenizer:
    """A byte-level BPE learnt from ``texts``: with few merges, or merges across words, it cuts elsewhere."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=257 + merges, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    return Tokenizer.open(folder)


def stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    return np.concatenate([ids.astype(np.int64) for _, ids in tokenizer.encode(texts)])


@given(TEXTS, TEXTS, WORDS, st.integers(0, 40), st.integers(0, 40), st.booleans(), st.data())
@settings(max_examples=60)
def test_every_span_covers_the_same_bytes_on_both_sides_and_no_token_is_in_two(
    learnt: list[str], other: list[str], words: list[str], few: int, many: int, regex: bool, data: st.DataObject
) -> None:
    texts = [*learnt, *other, "".join(words)]
    with tempfile.TemporaryDirectory() as name:
        teacher = bpe(Path(name) / "t", [*learnt, "".join(words)] * 3, many, words=regex)
        student = bpe(Path(name) / "s", other * 2, few, words=True)
        bridge = Bridge(teacher, student)
        whole = stream(student, texts)
        begin = data.draw(st.integers(0, len(whole) - 1))
        tokens = whole[begin : data.draw(st.integers(begin + 1, len(whole)))]
        crossing = bridge.cross(tokens)
        of = TokenBytes.of(teacher), TokenBytes.of(student)

    def covered(side: TokenBytes, ids: np.ndarray) -> list[bytes | None]:
        pieces = [side.pieces[i] for i in ids]
        return [None] if pieces == [None] else [b"".join(p if p is not None else b"<special>" for p in pieces)]

    spans = crossing.spans
    for s in range(len(spans)):
        t, u = (slice(*side[s]) for side in (spans.teacher, spans.student))
        assert t.start < t.stop
        assert u.start < u.stop
        assert covered(of[0], crossing.teacher[t]) == covered(of[1], tokens[u])
    for side in (spans.teacher, spans.student, spans.at):
        assert (side[1:, 0] >= side[:-1, 1]).all()
    # Whole characters are always read: what is not crossed is at most a cut character at either end.
    crossed = 0 if not len(spans) else int(spans.at[-1, 1] - spans.at[0, 0])
    total = int(of[1].widths(tokens).sum())
    if begin == 0 and len(tokens) == len(whole):
        assert crossed == total


@given(TEXTS, WORDS, st.integers(0, 40), st.data())
@settings(max_examples=40)
def test_equal_tokenizers_align_every_token_of_documents(
    learnt: list[str], words: list[str], merges: int, data: st.DataObject
) -> None:
    texts = [*learnt, "".join(words)]
    with tempfile.TemporaryDirectory() as name:
        one = bpe(Path(name) / "one", texts * 2, merges, words=True)
        bridge = Bridge(one, one)
        tokens = stream(one, texts)
        crossing = bridge.cross(tokens)
    assert crossing.teacher.tolist() == tokens.tolist()
    assert (crossing.spans.student == crossing.spans.teacher).all()
    # A span is one token on each side: none is left, none is joined.
    assert crossing.spans.student[:, 0].tolist() == list(range(len(tokens)))
    assert len(crossing.spans) == len(tokens)
    assert (bridge.id_map == np.arange(one.vocab_size)).all()
    if len(tokens) > 1:
        rows = random_rows(data.draw(st.integers(0, 2**32 - 1)), len(tokens) - 1, one.vocab_size, k=5)
        mapped = bridge.map_rows(crossing, rows, length=len(tokens), temperature=1.0)
        assert mapped.carries.all()
        assert (mapped.ids == rows.ids).all()
        assert (mapped.logprobs == rows.logprobs).all()
        np.testing.assert_allclose(mapped.tail, rows.tails[1.0], rtol=1e-5, atol=1e-6)


def random_rows(
    seed: int, n: int, vocabulary: int, *, k: int, temperatures: tuple[float, ...] = (1.0, 2.0)
) -> SequenceTargets:
    """Top-k rows of random dense distributions, with exact tails."""
    logits = np.random.default_rng(seed).normal(scale=3.0, size=(n, vocabulary))
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logp, axis=1, kind="stable")[:, :k]
    inside = np.take_along_axis(logp, ids, axis=1)
    mask = np.ones_like(logp, dtype=bool)
    np.put_along_axis(mask, ids, False, axis=1)
    tails = {t: np.log(np.where(mask, np.exp(logp / t), 0).sum(axis=1)).astype(np.float32) for t in temperatures}
    return SequenceTargets(ids.astype(np.int32), inside.astype(np.float32), tails)


@given(TEXTS, WORDS, st.integers(0, 40), st.integers(1, 12), st.sampled_from([1.0, 2.0]), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_mapped_rows_keep_the_mass_and_name_tokens_of_the_same_bytes(
    learnt: list[str], words: list[str], merges: int, k: int, temperature: float, seed: int
) -> None:
    texts = [*learnt, "".join(words) or "a"]
    with tempfile.TemporaryDirectory() as name:
        teacher = bpe(Path(name) / "t", ["".join(words)] * 3, merges, words=True)
        student = bpe(Path(name) / "s", learnt * 3, merges, words=False)
        bridge = Bridge(teacher, student)
        tokens = stream(student, texts)
        crossing = bridge.cross(tokens)
        of = TokenBytes.of(teacher), TokenBytes.of(student)
    if len(crossing.teacher) < 2:
        return
    rows = random_rows(seed, len(crossing.teacher) - 1, teacher.vocab_size, k=k)
    mapped = bridge.map_rows(crossing, rows, length=len(tokens), temperature=temperature)
    inside = np.exp(mapped.logprobs.astype(np.float64) / temperature).sum(axis=1)
    scaled = np.exp(rows.logprobs.astype(np.float64) / temperature).sum(axis=1) + np.exp(rows.tails[temperature])
    for row in range(len(tokens) - 1):
        ids = [i for i in mapped.ids[row] if i >= 0]
        assert len(set(ids)) == len(ids)
        assert all(i < 0 for i in mapped.ids[row][len(ids) :])
        if not mapped.carries[row]:
            assert not ids
            assert mapped.tail[row] == 0.0
            continue
        (at,) = np.flatnonzero(crossing.spans.student[:, 0] == row + 1)
        first, last = crossing.spans.teacher[at]
        total = 1.0 if last - first > 1 else scaled[first - 1]
        assert abs(inside[row] + np.exp(mapped.tail[row]) - total) < 1e-4 * total
        if last - first == 1:
            teacher_says = dict(zip(rows.ids[first - 1].tolist(), rows.logprobs[first - 1].tolist(), strict=True))
            by_bytes = {of[0].pieces[i]: p for i, p in teacher_says.items()}
            for i, logprob in zip(ids, mapped.logprobs[row], strict=False):
                assert by_bytes[of[1].pieces[i]] == logprob


def test_a_student_token_that_the_teacher_writes_in_two_gets_the_product_along_the_path(tmp_path: Path) -> None:
    teacher = bpe(tmp_path / "t", ["x"], 0, words=True)  # bytes alone
    student = bpe(tmp_path / "s", ["ab ab ab"] * 9, 1, words=True)  # has "ab"
    bridge = Bridge(teacher, student)
    known = student.backend.token_to_id("ab")
    a, b, c = (teacher.backend.token_to_id(x) for x in "abc")
    tokens = np.array([student.eos_id, known, student.eos_id], dtype=np.int64)
    crossing = bridge.cross(tokens)
    assert crossing.teacher.tolist() == [teacher.eos_id, a, b, teacher.eos_id]
    logp = np.log(np.array([[0.6, 0.3], [0.5, 0.25], [0.8, 0.1]], dtype=np.float32))
    rows = SequenceTargets(
        np.array([[a, c], [b, c], [0, a]], dtype=np.int32), logp, {1.0: np.log([0.1, 0.25, 0.1]).astype(np.float32)}
    )
    mapped = bridge.map_rows(crossing, rows, length=3, temperature=1.0)
    # "c" instead of the path's first step; "ab" along it; "ac" is no student token.
    assert mapped.ids[0].tolist() == [known, c] or mapped.ids[0].tolist() == [c, known]
    by_id = dict(zip(mapped.ids[0].tolist(), np.exp(mapped.logprobs[0]).tolist(), strict=True))
    assert by_id[known] == pytest.approx(0.3)
    assert by_id[c] == pytest.approx(0.3)
    assert np.exp(mapped.tail[0]) == pytest.approx(0.4)
    assert mapped.carries.tolist() == [True, True]
    assert mapped.ids[1].tolist() == [0, a]


def test_a_path_whose_own_probability_is_not_known_carries_nothing(tmp_path: Path) -> None:
    teacher = bpe(tmp_path / "t", ["x"], 0, words=True)
    student = bpe(tmp_path / "s", ["ab ab ab"] * 9, 1, words=True)
    tokens = np.array([student.eos_id, student.backend.token_to_id("ab")], dtype=np.int64)
    bridge = Bridge(teacher, student)
    crossing = bridge.cross(tokens)
    c = teacher.backend.token_to_id("c")
    half = np.full((2, 1), np.log(0.5), dtype=np.float32)
    rows = SequenceTargets(np.array([[c], [c]], dtype=np.int32), half, {1.0: half[:, 0], 2.0: half[:, 0]})
    for temperature in (1.0, 2.0):
        mapped = bridge.map_rows(crossing, rows, length=2, temperature=temperature)
        assert not mapped.carries.any()
        assert mapped.tail.tolist() == [0.0]


def test_rows_that_begin_and_end_inside_a_character_align_what_is_whole(tmp_path: Path) -> None:
    teacher = bpe(tmp_path / "t", ["本本"] * 5, 2, words=True)
    student = bpe(tmp_path / "s", ["x"], 0, words=True)
    tokens = stream(student, ["日本語"])[1:-2]  # without the first byte, the last byte and the end
    crossing = Bridge(teacher, student).cross(tokens)
    assert teacher.backend.decode(crossing.teacher.tolist()) == "本"
    assert crossing.spans.at.tolist() == [[2, 5]]


def test_a_text_that_the_teachers_normaliser_changes_is_not_crossed_further(tmp_path: Path) -> None:
    teacher = bpe(tmp_path / "t", ["x"], 0, words=True)
    teacher.backend.normalizer = tokenizers.normalizers.NFC()
    student = bpe(tmp_path / "s", ["x"], 0, words=True)
    crossing = Bridge(teacher, student).cross(stream(student, ["abc", "e\u0301", "def"]))
    assert len(crossing.spans) == 4  # "abc" and its end
    assert crossing.spans.at[-1].tolist() == [3, 4]


def test_a_teacher_that_begins_with_bos_is_given_one_a_document(tmp_path: Path) -> None:
    teacher = bpe(tmp_path / "t", ["ab"], 0, words=True)
    config = {"eos_token": EOS, "bos_token": EOS, "add_bos_token": True}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config))
    student = bpe(tmp_path / "s", ["ab"], 0, words=True)
    bridge = Bridge(teacher, student)
    crossing = bridge.cross(stream(student, ["a", "b"]))
    a, b = (teacher.backend.token_to_id(x) for x in "ab")
    assert crossing.teacher.tolist() == [0, a, 0, 0, b, 0, 0]
    assert crossing.spans.teacher[:, 0].tolist() == [1, 2, 4, 5]
    assert crossing.spans.student[:, 0].tolist() == [0, 1, 2, 3]
    assert "before each document" in bridge.notes[1]


def test_offsets_that_do_not_ascend_are_refused() -> None:
    with pytest.raises(RefusedError, match="teacher's boundaries"):
        align(np.array([0, 3, 2]), np.array([0, 3]))


def test_spans_end_where_both_sides_have_a_boundary() -> None:
    spans = align(boundaries(np.array([1, 2, 3])), boundaries(np.array([3, 1, 2])))
    assert spans.at.tolist() == [[0, 3], [3, 6]]
    assert spans.teacher.tolist() == [[0, 2], [2, 3]]
    assert spans.student.tolist() == [[0, 1], [1, 3]]


def test_a_vocabulary_whose_tokens_have_no_bytes_is_refused(tmp_path: Path) -> None:
    tokenizer = bpe(tmp_path / "t", ["ab"], 0, words=True)
    tokenizer.backend.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(RefusedError, match=r"decoder \(WordPiece\)"):
        TokenBytes.of(tokenizer)


def test_sentencepiece_pieces_are_read_with_their_blanks_and_bytes(tmp_path: Path) -> None:
    words = {"<0x0A>": 1, "▁the": 2, "re": 3, "▁": 4, "é": 5, EOS: 0}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[], byte_fallback=True))
    backend.add_special_tokens([EOS])
    kinds = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    backend.decoder = tokenizers.decoders.Sequence(kinds)
    (tmp_path / "s").mkdir()
    backend.save(str(tmp_path / "s" / "tokenizer.json"))
    (tmp_path / "s" / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    pieces = TokenBytes.of(Tokenizer.open(tmp_path / "s"))
    assert pieces.pieces == (None, b"\n", b" the", b"re", b" ", "é".encode())
    assert pieces.join([2, 3, 1]) == b" there\n"
