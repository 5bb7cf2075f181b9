"""Packed rows: what goes in comes out, the same bytes every time, and nothing altered is opened."""

from __future__ import annotations

import filecmp
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentforge.data import BatchOrder, ShardSet, build_shards
from latentforge.data.corpus import Corpus
from latentforge.data.shards import pack
from latentforge.data.tokenizer import EOS, Tokenizer, copy_tokenizer, train_bpe
from latentforge.errors import RefusedError
from latentforge.evidence.digests import file_sha256

WORDS = ["grüße", "the", "other", "return", "def", "import", "日本", "\n", "  ", EOS, "x=1"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.Generator(np.random.PCG64(5))
    for number in range(120):
        words = generator.choice(WORDS, size=int(generator.integers(1, 120)))
        (folder / f"{number}.txt").write_text(f"{number} " + " ".join(words), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def built(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return build(corpus, tmp_path_factory.mktemp("out"))


def build(corpus: Path, out: Path, **changed: object) -> ShardSet:
    asked = {"vocab_size": 280, "sequence_length": 16, "train_sequences": None, "heldout_sequences": 30, **changed}
    return build_shards(corpus, out, **asked)  # type: ignore[arg-type]


@pytest.fixture
def altered(built: ShardSet, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built.folder, tmp_path / "out"))


def test_the_same_inputs_give_the_same_bytes(built: ShardSet, corpus: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from latentforge.data import build_shards; "
        "build_shards(sys.argv[1], Path(sys.argv[2]), vocab_size=280, sequence_length=16, train_sequences=None, "
        "heldout_sequences=30)"
    )
    elsewhere = Path(shutil.copytree(corpus, tmp_path / "moved"))
    subprocess.run([sys.executable, "-c", code, str(elsewhere), str(tmp_path / "out")], check=True)
    names = sorted(p.relative_to(built.folder) for p in built.folder.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file())
    for name in names:
        assert filecmp.cmp(built.folder / name, tmp_path / "out" / name, shallow=False), name


def test_rows_decode_to_the_documents_and_quoting_the_end_token_ends_nothing(built: ShardSet, corpus: Path) -> None:
    stream = built.train.rows(np.arange(len(built.train))).reshape(-1)
    backend = built.tokenizer().backend
    ends = np.flatnonzero(stream == built.eos_id)
    decoded = [backend.decode(part.tolist()) for part in np.split(stream, ends + 1)][:-1]
    texts = {path.read_text(encoding="utf-8") for path in corpus.iterdir()}
    assert len(decoded) > 80
    assert [text for text in decoded if text not in texts] == []
    assert any(EOS in text for text in decoded), "the corpus quotes the end token"


def test_no_heldout_document_is_in_the_training_rows(built: ShardSet) -> None:
    def texts(shard: object) -> set[bytes]:
        stream = shard.rows(np.arange(len(shard))).reshape(-1)  # type: ignore[attr-defined,arg-type]
        return {part.tobytes() for part in np.split(stream, np.flatnonzero(stream == built.eos_id) + 1)[:-1]}

    train, heldout = texts(built.train), texts(built.heldout)
    assert train
    assert heldout
    assert not train & heldout


def test_documents_never_share_a_chunk_and_what_follows_an_end_is_filled_with_it(corpus: Path, tmp_path: Path) -> None:
    plain = build(corpus, tmp_path / "plain", heldout_sequences=8)
    cut = build(corpus, tmp_path / "cut", chunk=4, heldout_sequences=8)
    assert (plain.chunk, cut.chunk) == (1, 4)
    stream = cut.train.rows(np.arange(len(cut.train))).reshape(-1, 4)
    unfilled = []
    for chunk in stream:
        ended = np.flatnonzero(chunk == cut.eos_id)
        assert not len(ended) or (chunk[ended[0] :] == cut.eos_id).all()
        unfilled.append(chunk[: ended[0] + 1] if len(ended) else chunk)
    text = plain.train.rows(np.arange(len(plain.train))).reshape(-1)
    kept = np.concatenate(unfilled)
    both = min(len(text), len(kept))
    assert both > 1000
    assert (kept[:both] == text[:both]).all()
    # What fills a chunk is no token: bytes a token are those of the text.
    assert cut.record["bytes_per_token"] == pytest.approx(plain.record["bytes_per_token"], rel=0.02)


def test_rows_that_would_end_inside_a_chunk_are_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="sequence_length = 16 is not a multiple of chunk = 3"):
        build(corpus, tmp_path / "out", chunk=3)


def test_data_json_says_what_was_done(built: ShardSet) -> None:
    record = built.record
    assert record["heldout_sequences"] == len(built.heldout) == 30
    assert record["train_sequences"] == len(built.train)
    assert (record["vocab_size"], record["dtype"], record["eos_id"]) == (280, "uint16", 0)
    assert record["corpus"]["files"] == 120
    assert 1.0 < record["bytes_per_token"] < 10.0
    built.verify()


def test_the_number_of_rows_is_what_was_asked(corpus: Path, tmp_path: Path) -> None:
    shards = build(corpus, tmp_path, train_sequences=20, heldout_sequences=2)
    assert (len(shards.train), len(shards.heldout)) == (20, 2)
    assert (tmp_path / "train.bin").stat().st_size == 20 * 16 * 2


@pytest.mark.parametrize("field", ["train_sequences", "heldout_sequences"])
def test_a_corpus_that_is_too_small_is_refused_with_both_numbers(corpus: Path, tmp_path: Path, field: str) -> None:
    with pytest.raises(RefusedError, match=rf"{field} = 100000: the corpus has only \d+ rows of 16 tokens"):
        build(corpus, tmp_path, **{field: 100_000})
    assert not (tmp_path / "data.json").exists()


def test_a_corpus_of_one_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(RefusedError, match="1 document"):
        build(tmp_path / "a.txt", tmp_path / "out")


def test_a_vocabulary_that_the_corpus_cannot_fill_is_refused_with_its_size(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"vocab_size = 50000: the corpus yields only \d+ tokens") as caught:
        build(corpus, tmp_path, vocab_size=50_000)
    assert "data.vocab_size =" in str(caught.value.next)


@pytest.mark.parametrize("size", [-2, -1, 1, 2])
def test_a_shard_of_another_size_is_refused_on_open(altered: Path, size: int) -> None:
    content = (altered / "train.bin").read_bytes()
    (altered / "train.bin").write_bytes(content[:size] if size < 0 else content + bytes(size))
    with pytest.raises(RefusedError, match=r"train\.bin has \d+ bytes, data\.json says"):
        ShardSet.open(altered)


@pytest.mark.parametrize("name", ["train.bin", "heldout.bin", "tokenizer/tokenizer.json"])
def test_one_changed_byte_is_found_by_verify(altered: Path, name: str) -> None:
    content = bytearray((altered / name).read_bytes())
    content[len(content) // 2] ^= 1
    (altered / name).write_bytes(content)
    with pytest.raises(RefusedError, match=Path(name).name):
        ShardSet.open(altered).verify()


@pytest.mark.parametrize("name", ["train.bin", "heldout.bin", "data.json"])
def test_a_missing_file_is_refused_by_name(altered: Path, name: str) -> None:
    (altered / name).unlink()
    with pytest.raises(RefusedError, match=f"{name} is missing"):
        ShardSet.open(altered)


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "uint32"), ("dtype", 3), ("vocab_size", "many"), ("shards", {}), ("eos_id", None)]
)
def test_a_record_that_cannot_be_right_is_refused(altered: Path, field: str, value: object) -> None:
    record = json.loads((altered / "data.json").read_text())
    (altered / "data.json").write_text(json.dumps({**record, field: value}))
    with pytest.raises(RefusedError, match=r"data\.json"):
        ShardSet.open(altered)


def test_a_row_outside_the_shard_is_refused(built: ShardSet) -> None:
    with pytest.raises(RefusedError, match="row"):
        built.train.rows([0, len(built.train)])
    with pytest.raises(RefusedError, match="row"):
        built.train.rows([-1])


documents_of_ids = st.lists(
    st.lists(st.integers(1, 99), max_size=40).map(lambda ids: np.array([*ids, 0], dtype=np.uint32)), max_size=30
)


@given(documents=documents_of_ids, length=st.integers(1, 17), limit=st.none() | st.integers(0, 20))
def test_packing_loses_no_token_and_stops_at_the_limit(
    tmp_path_factory: pytest.TempPathFactory, documents: list[np.ndarray], length: int, limit: int | None
) -> None:
    path = tmp_path_factory.mktemp("p") / "train.bin"
    packed = pack(((len(ids), ids) for ids in documents), path, vocab_size=100, sequence_length=length, limit=limit)
    stream = np.concatenate([np.empty(0, np.uint32), *documents])
    rows = len(stream) // length if limit is None else min(limit, len(stream) // length)
    assert packed.rows == rows
    assert np.array_equal(np.fromfile(path, dtype="<u2"), stream[: rows * length])
    assert packed.tokens >= rows * length


@given(texts=st.lists(st.text(st.characters(codec="utf-8")) | st.just(f"a{EOS}b"), max_size=15))
def test_every_document_comes_back_whole_and_ends_in_the_end_token(
    tmp_path_factory: pytest.TempPathFactory, built: ShardSet, texts: list[str]
) -> None:
    tokenizer, path = built.tokenizer(), tmp_path_factory.mktemp("p") / "train.bin"
    pack(tokenizer.encode(texts), path, vocab_size=tokenizer.vocab_size, sequence_length=1, limit=None)
    stream = np.fromfile(path, dtype="<u2")
    parts = np.split(stream, np.flatnonzero(stream == tokenizer.eos_id) + 1)
    assert parts.pop().size == 0, "nothing follows the last end token"
    assert [tokenizer.backend.decode(part.tolist()) for part in parts] == texts


@given(n=st.integers(1, 60), batch=st.integers(1, 70), seed=st.integers(0, 2**53 - 1), steps=st.integers(1, 8))
def test_every_epoch_sees_every_row_once_and_a_step_needs_no_history(n: int, batch: int, seed: int, steps: int) -> None:
    order = BatchOrder(n, batch, seed)
    stream = np.concatenate([order.indices(step) for step in range(steps)])
    for epoch in range(len(stream) // n):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert np.array_equal(BatchOrder(n, batch, seed).indices(steps - 1), order.indices(steps - 1))


def test_the_order_of_batches_is_fixed_for_all_time() -> None:
    assert BatchOrder(10, 4, 7).indices(0).tolist() == [3, 7, 1, 6]
    assert BatchOrder(10, 4, 7).indices(1_000_000).tolist() == BatchOrder(10, 4, 7).indices(1_000_000).tolist()
    assert BatchOrder(1000, 16, 7).indices(0).tolist() != BatchOrder(1000, 16, 8).indices(0).tolist()


def test_epochs_are_in_different_orders() -> None:
    order = BatchOrder(200, 200, 7)
    assert order.indices(0).tolist() != order.indices(1).tolist()
    assert order.epoch(3) == 3.0


@pytest.mark.parametrize(("n", "batch", "seed"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_an_order_over_nothing_is_refused(n: int, batch: int, seed: int) -> None:
    with pytest.raises(RefusedError):
        BatchOrder(n, batch, seed)


def test_transformers_loads_the_tokenizer_and_agrees_with_it(built: ShardSet) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(built.tokenizer_dir), local_files_only=True)
    assert (theirs.eos_token, theirs.eos_token_id, len(theirs)) == (EOS, built.eos_id, built.vocab_size)
    text = "def grüße(the, other): return 日本\n"
    _, ids = next(built.tokenizer().encode([text]))
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids[:-1].tolist()
    assert theirs.decode(ids[:-1].tolist()) == text


def test_a_teachers_tokenizer_is_used_unchanged(built: ShardSet, corpus: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    tokenizer = train_bpe(["another corpus, another vocabulary, other corpora"] * 3, 263, teacher)
    # What a careless owner leaves behind: it must not shorten documents.
    tokenizer.backend.enable_truncation(max_length=4)
    tokenizer.backend.enable_padding(length=64)
    tokenizer.backend.save(str(teacher / "tokenizer.json"))
    shards = build(corpus, tmp_path / "out", tokenizer_folder=teacher)
    assert shards.vocab_size == 263
    assert filecmp.cmp(teacher / "tokenizer.json", tmp_path / "out" / "tokenizer" / "tokenizer.json", shallow=False)
    assert shards.record["documents"]["train"] > 80
    assert len(shards.train) > len(built.train), "fewer merges, more tokens: nothing was cut"


def test_a_folder_without_tokenizer_or_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"has no tokenizer\.json"):
        Tokenizer.open(tmp_path)
    train_bpe(["the other the other"], 260, tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(RefusedError, match="names no eos_token"):
        Tokenizer.open(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": [5, 6]}')
    assert Tokenizer.open(tmp_path).eos_id == 5
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<absent>"}')
    with pytest.raises(RefusedError, match="'<absent>' is not in"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(RefusedError, match="cannot be read"):
        Tokenizer.open(tmp_path)


def test_copying_a_tokenizer_never_replaces_a_models_configuration(tmp_path: Path) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    train_bpe(["the other the other"], 260, teacher)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (teacher / name).unlink()
    (teacher / "config.json").write_text('{"eos_token_id": 5, "hidden_size": 4096}')
    assert copy_tokenizer(teacher, tmp_path / "data").eos_id == 5
    student.mkdir()
    (student / "config.json").write_text('{"eos_token_id": 5, "hidden_size": 64}')
    assert copy_tokenizer(teacher, student).eos_id == 5
    assert "64" in (student / "config.json").read_text()


def test_the_files_that_rows_come_from_are_listed_in_the_order_of_reading(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number:02d}.txt").write_text(f"text number {number} " * 30)
    (corpus / "empty.txt").write_text(" \n")
    out = tmp_path / "out"
    asked = {"vocab_size": 270, "sequence_length": 16, "heldout_sequences": 2}
    build_shards(corpus, out, **asked, train_sequences=40)
    lines = [json.loads(line) for line in (out / "corpus.jsonl").read_text().splitlines()]
    splits = {split: [one["name"] for one in lines if one["split"] == split] for split in ("heldout", "train")}
    opened = Corpus.open(corpus)
    orders = {split: list(opened.entries(heldout=split == "heldout")) for split in ("train", "heldout")}
    record = json.loads((out / "data.json").read_bytes())
    for split, names in splits.items():
        assert names == [entry.name for entry in orders[split]][: record["documents"][split]]
    assert 0 < len(splits["train"]) < 50, "files of which no row was packed are not named"
    assert all(one["sha256"] == file_sha256(corpus / one["name"]) for one in lines)
    build_shards(corpus, tmp_path / "again", **asked, train_sequences=40)
    assert (tmp_path / "again" / "corpus.jsonl").read_bytes() == (out / "corpus.jsonl").read_bytes()
