"""The store of continuations: what is read is what was drawn, after the right chunk, or a refusal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentforge.errors import RefusedError
from latentforge.targets import TargetStore
from latentforge.targets.continuations import ContinuationStore
from latentforge.targets.continued import absorbed, contexts, pack, unpack
from latentforge.targets.making import ExistsError
from latentforge.targets.store import MissingError

IDENTITY = {"model": "Qwen3ForCausalLM", "sha256": "ab" * 32, "quantization": "float32", "tokenizer_sha256": "cd" * 32}
VOCABULARY, CHUNK, COUNT, CHUNKS, EOS = 300, 4, 3, 5, 2
TEMPERATURES = (1.0, 0.5)


def sequences(n: int, *, seed: int = 0) -> np.ndarray:
    """Rows of five chunks; one chunk of each holds the end of a document, with padding behind it."""
    rows = np.empty((n, CHUNKS, CHUNK), np.int64)
    for number, row in enumerate(rows):
        generator = np.random.Generator(np.random.PCG64([seed, number]))
        row[:] = generator.integers(3, VOCABULARY, (CHUNKS, CHUNK))
        row[generator.integers(0, CHUNKS), generator.integers(0, CHUNK) :] = EOS
    return rows.reshape(n, -1)


def drawn_for(tokens: np.ndarray) -> dict[float, np.ndarray]:
    """A deterministic teacher: its draws follow from the tokens, so a reader can tell right from wrong."""
    found = {}
    for temperature in TEMPERATURES:
        generator = np.random.Generator(np.random.PCG64([*tokens.tolist(), int(temperature * 10)]))
        ids = generator.integers(0, VOCABULARY, (CHUNKS - 1, COUNT, CHUNK)).astype(np.int32)
        ids[~contexts(tokens, CHUNK, EOS)] = -1
        found[temperature] = ids
    return found


def same(found: dict[float, np.ndarray], tokens: np.ndarray) -> bool:
    wanted = drawn_for(tokens)
    return list(found) == list(wanted) and all(np.array_equal(found[t], absorbed(wanted[t], EOS)) for t in wanted)


def create(path: Path, **changed: Any) -> ContinuationStore:
    asked: dict[str, Any] = {
        "identity": IDENTITY,
        "chunk": CHUNK,
        "count": COUNT,
        "temperatures": TEMPERATURES,
        "vocab_size": VOCABULARY,
        "eos_id": EOS,
        "seed": 7,
    }
    return ContinuationStore.create(path, **{**asked, **changed})


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    path = tmp_path / "continuations.sqlite"
    with create(path) as store:
        for tokens in sequences(20):
            assert store.put(tokens, drawn_for(tokens))
    return path


def test_rows_come_back_and_a_second_one_of_a_sequence_changes_nothing(filled: Path) -> None:
    other = {t: np.where(ids < 0, ids, 5).astype(np.int32) for t, ids in drawn_for(sequences(1)[0]).items()}
    with ContinuationStore.open(filled, readonly=False) as store:
        assert not store.put(sequences(1)[0], other)
    with ContinuationStore.open(filled) as store:
        assert all(same(store.get(tokens), tokens) for tokens in sequences(20)[::-1])
        assert store.stats()["rows"] == 20
        assert store.check().good
        with pytest.raises(RefusedError, match="reading only"):
            store.put(sequences(1)[0], other)
    assert [p.name for p in filled.parent.iterdir()] == [filled.name], "closed after writing, it is one file"


def test_a_batch_has_the_chunks_after_each_chunk_and_says_where_a_document_ended(filled: Path) -> None:
    rows = sequences(4)
    with ContinuationStore.open(filled) as store:
        found = store.of(torch.from_numpy(rows), 0.5)
    assert found.ids.shape == (4, CHUNKS - 1, COUNT, CHUNK)
    assert found.ids.dtype == torch.int64
    ends = (rows.reshape(4, CHUNKS, CHUNK)[:, :-1] == EOS).any(-1)
    assert torch.equal(found.given, torch.from_numpy(~ends))
    assert (~found.given).any()
    assert (found.ids[~found.given] == EOS).all(), "no id stands there that is none"
    for row, ids, there in zip(rows, found.ids.numpy(), found.given.numpy(), strict=True):
        assert np.array_equal(ids[there], absorbed(drawn_for(row)[0.5], EOS)[there])


def test_what_follows_an_end_of_text_is_that_end(tmp_path: Path) -> None:
    tokens = np.arange(10, 10 + 2 * CHUNK)
    ids = np.array([[[5, EOS, 7, 8], [EOS, 1, 1, 1], [5, 6, 7, EOS]]], dtype=np.int32)
    with create(tmp_path / "c.sqlite", temperatures=[1.0]) as store:
        store.put(tokens, {1.0: ids})
        kept = store.get(tokens)[1.0]
    assert kept.tolist() == [[[5, EOS, EOS, EOS], [EOS] * 4, [5, 6, 7, EOS]]]


@settings(max_examples=60)
@given(data=st.data())
def test_every_row_reads_as_it_was_packed(data: st.DataObject) -> None:
    vocabulary = data.draw(st.sampled_from([1, 2, 255, 256, 257, 65_536, 65_537, 151_936]))
    chunk, count, many = (data.draw(st.integers(1, 9), label=name) for name in ("chunk", "count", "contexts"))
    temperatures = tuple(data.draw(st.lists(st.floats(0.01, 2.0), min_size=1, max_size=3, unique=True)))
    there = np.array(data.draw(st.lists(st.booleans(), min_size=many, max_size=many)), dtype=bool)
    generator = np.random.Generator(np.random.PCG64(data.draw(st.integers(0, 9))))
    drawn = {t: generator.integers(0, vocabulary, (many, count, chunk)).astype(np.int32) for t in temperatures}
    for ids in drawn.values():
        ids.flat[0] = vocabulary - 1
    value = pack(b"k" * 32, drawn, there, vocab_size=vocabulary)
    found = unpack(b"k" * 32, value, temperatures=temperatures, vocab_size=vocabulary)
    assert list(found) == list(drawn)
    assert all(np.array_equal(found[t], drawn[t][there]) for t in drawn)


def test_every_changed_byte_of_a_row_is_refused() -> None:
    tokens = sequences(1)[0]
    key, there = b"k" * 32, contexts(tokens, CHUNK, EOS)
    value = pack(key, drawn_for(tokens), there, vocab_size=VOCABULARY)

    def read(name: bytes, content: bytes) -> None:
        unpack(name, content, temperatures=TEMPERATURES, vocab_size=VOCABULARY)

    read(key, value)
    for at in range(len(value)):
        for wrong in (value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :], value[:at]):
            with pytest.raises(RefusedError, match="damaged"):
                read(key, wrong)
    with pytest.raises(RefusedError, match="damaged"):
        read(b"K" * 32, value)


@pytest.fixture(scope="module")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("c") / "continuations.sqlite"
    with create(path) as store:
        for tokens in sequences(6):
            store.put(tokens, drawn_for(tokens))
    return path


@settings(max_examples=40)
@given(data=st.data())
def test_a_store_with_changed_bytes_gives_right_rows_or_a_refusal(small_store: Path, data: st.DataObject) -> None:
    path = small_store.with_name("changed.sqlite")
    content = bytearray(small_store.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        with ContinuationStore.open(path) as store:
            for tokens in sequences(6):
                try:
                    assert same(store.get(tokens), tokens)
                except RefusedError:
                    continue
    except RefusedError:
        pass


@pytest.mark.parametrize(
    "changed",
    [
        {"identity": {**IDENTITY, "sha256": "ef" * 32}},
        {"chunk": 2},
        {"count": 4},
        {"temperatures": [1.0]},
        {"vocab_size": 301},
        {"eos_id": 3},
        {"seed": 8},
    ],
)
def test_a_store_made_for_something_else_is_refused_and_has_other_keys(filled: Path, changed: dict[str, Any]) -> None:
    tokens = sequences(1)[0]
    with pytest.raises(RefusedError, match="was made for"):
        ContinuationStore.open(filled, **changed)
    with create(filled.with_name("other.sqlite"), **changed) as other, ContinuationStore.open(filled) as store:
        assert other.key(tokens) != store.key(tokens)


@pytest.mark.parametrize(
    "changed",
    [{"chunk": 0}, {"count": 0}, {"temperatures": []}, {"temperatures": [1.0, 1.0]}, {"eos_id": 300}, {"eos_id": -1}],
)
def test_parameters_that_make_no_store_are_refused_and_leave_no_file(tmp_path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(RefusedError):
        create(tmp_path / "c.sqlite", **changed)
    assert not list(tmp_path.iterdir())


def broken(tokens: np.ndarray, what: str) -> dict[float, np.ndarray]:
    drawn = drawn_for(tokens)
    first = contexts(tokens, CHUNK, EOS).argmax()
    if what == "id":
        drawn[1.0][first, 0, 0] = VOCABULARY
    elif what == "none":
        drawn[1.0][first, 0, 0] = -1
    elif what == "after an end":
        drawn[1.0][~contexts(tokens, CHUNK, EOS)] = 5
    elif what == "temperature":
        del drawn[0.5]
    elif what == "draws":
        drawn[0.5] = drawn[0.5][:, 1:]
    elif what == "chunk":
        drawn[0.5] = drawn[0.5][:, :, 1:]
    elif what == "contexts":
        drawn[0.5] = drawn[0.5][1:]
    elif what == "type":
        drawn[0.5] = drawn[0.5].astype(np.float32)
    return drawn


@pytest.mark.parametrize("what", ["id", "none", "after an end", "temperature", "draws", "chunk", "contexts", "type"])
def test_continuations_that_no_teacher_can_have_drawn_are_refused_and_not_written(tmp_path: Path, what: str) -> None:
    # This row's document ends before its last chunk, after which another begins.
    tokens = next(one for one in sequences(20) if not contexts(one, CHUNK, EOS).all())
    with create(tmp_path / "c.sqlite") as store:
        with pytest.raises(RefusedError, match="continuations"):
            store.put(tokens, broken(tokens, what))
        assert store.stats()["rows"] == 0


def test_a_sequence_that_was_not_continued_is_refused_never_silently_left_out(filled: Path) -> None:
    rows = np.concatenate([sequences(1), sequences(1, seed=9)])
    with ContinuationStore.open(filled) as store:
        with pytest.raises(MissingError, match="no continuations of 1 of 2 sequences"):
            store.of(torch.from_numpy(rows), 1.0)
        assert str(store.coverage(store.key(tokens) for tokens in rows)) == "50.0 % (1 of 2 sequences)"
        with pytest.raises(RefusedError, match=r"T = 0\.7, but at 1, 0\.5"):
            store.of(torch.from_numpy(rows[:1]), 0.7)
        with pytest.raises(RefusedError, match="chunks of 4"):
            store.of(torch.from_numpy(rows[:1, :7]), 1.0)


def test_one_kind_of_store_is_not_taken_for_the_other(filled: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="is a store of continuations, not of targets"):
        TargetStore.open(filled)
    with TargetStore.create(tmp_path / "targets.sqlite", IDENTITY, 4, [1.0], vocab_size=VOCABULARY) as store:
        path = store.path
    with pytest.raises(RefusedError, match="no store of continuations"):
        ContinuationStore.open(path)
    with pytest.raises(RefusedError, match="does not exist"):
        ContinuationStore.open(tmp_path / "absent.sqlite")
    with pytest.raises(ExistsError):
        create(filled)


_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_continuations import create, drawn_for, sequences
with create(Path(sys.argv[1])) as store:
    for number in range(100_000):
        tokens = sequences(1, seed=number)[0]
        store.put(tokens, drawn_for(tokens))
        if number == 30:
            print("thirty", flush=True)
"""


def test_a_writer_that_is_killed_between_rows_leaves_whole_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "continuations.sqlite"
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path), str(Path(__file__).parent)], stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"thirty\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    with ContinuationStore.open(path, readonly=False) as store:
        rows = store.stats()["rows"]
        assert rows >= 30
        assert all(same(store.get(tokens), tokens) for tokens in (sequences(1, seed=n)[0] for n in range(rows)))


def test_a_damaged_row_is_dropped_and_can_be_drawn_again(filled: Path) -> None:
    tokens = sequences(1)[0]
    with ContinuationStore.open(filled, readonly=False) as store:
        key = store.key(tokens)
        with store._connection.transaction() as connection:
            ((value,),) = connection.execute("SELECT value FROM rows WHERE key = ?", (key,)).fetchall()
            wrong = bytes(value[:-1]) + bytes([value[-1] ^ 1])
            connection.execute("UPDATE rows SET value = ? WHERE key = ?", (wrong, key))
        with pytest.raises(RefusedError, match="damaged"):
            store.get(tokens)
        assert store.check().damaged == (key.hex(),)
        assert store.drop_damaged() == 1
        assert store.put(tokens, drawn_for(tokens))
        assert same(store.get(tokens), tokens)
