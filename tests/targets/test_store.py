"""The store of targets: what is read is what was written, for the teacher it was written for, or a refusal."""

from __future__ import annotations

import os
import signal
import sqlite3
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
from latentforge.targets import SequenceTargets, TargetStore
from latentforge.targets.levels import TAIL_STEP
from latentforge.targets.row import GRADED, pack_row, unpack_row
from latentforge.targets.topk import sequence_rows, topk_rows

IDENTITY = {"model": "Qwen3ForCausalLM", "sha256": "ab" * 32, "quantization": "float32", "tokenizer_sha256": "cd" * 32}
VOCABULARY, K, LENGTH = 300, 4, 9
TEMPERATURES = (1.0, 2.0)


def targets_of(tokens: np.ndarray, *, vocabulary: int = VOCABULARY, k: int = K) -> SequenceTargets:
    """A deterministic teacher: its rows follow from the tokens, so a reader can tell right from wrong."""
    generator = torch.Generator().manual_seed(int(tokens.astype(np.int64).sum()) * 1000 + int(tokens[0]))
    logits = torch.randn(len(tokens) - 1, vocabulary, generator=generator) * 3
    return sequence_rows(*topk_rows(logits, k, TEMPERATURES), sequences=1)[0]


def sequences(n: int, *, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).integers(0, VOCABULARY, (n, length))


def same(found: SequenceTargets, given: SequenceTargets) -> bool:
    """What was given, but for the rounding that the format promises."""
    return (
        np.array_equal(found.ids, given.ids)
        and bool((np.abs(found.logprobs - given.logprobs) <= GRADED.error(given.logprobs)).all())
        and list(found.tails) == list(given.tails)
        and all(np.allclose(found.tails[t], given.tails[t], rtol=0, atol=TAIL_STEP / 2 + 1e-5) for t in found.tails)
    )


def create(path: Path, **changed: Any) -> TargetStore:
    asked = {"identity": IDENTITY, "k": K, "temperatures": TEMPERATURES, "vocab_size": VOCABULARY, **changed}
    return TargetStore.create(path, **asked)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    path = tmp_path / "targets.sqlite"
    with create(path) as store:
        store.put_many((tokens, targets_of(tokens)) for tokens in sequences(20))
    return path


def test_rows_come_back_in_any_order(filled: Path) -> None:
    with TargetStore.open(filled) as store:
        wanted = sequences(20)[::-1]
        for tokens, found in zip(wanted, store.get_many(wanted), strict=True):
            assert same(found, targets_of(tokens))
            assert found.ids.dtype == np.int32
            assert found.ids.shape == (LENGTH - 1, K)
        assert same(store.get(wanted[3]), targets_of(wanted[3])), "again, from memory"


def test_a_small_cache_changes_no_answer(filled: Path) -> None:
    one = targets_of(sequences(1)[0]).nbytes
    with TargetStore.open(filled, cache_bytes=3 * one) as store:
        for _ in range(2):
            for tokens, found in zip(sequences(20), store.get_many(sequences(20)), strict=True):
                assert same(found, targets_of(tokens))


def test_reading_makes_and_touches_no_file(filled: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in filled.parent.iterdir()}

    before = state()
    assert list(before) == ["targets.sqlite"], "closed after writing, it is one file"
    filled.chmod(0o444)
    with TargetStore.open(filled) as store:
        store.get(sequences(1)[0])
        assert state() == before
        with pytest.raises(RefusedError, match="reading only"):
            store.put_many([])
    assert state() == before


def test_a_sequence_that_was_not_scored_is_refused_never_zero(filled: Path) -> None:
    with TargetStore.open(filled) as store:
        unknown = sequences(1, seed=9)
        with pytest.raises(RefusedError, match="no targets for 1 of 2 sequences"):
            store.get_many(np.concatenate([sequences(1), unknown]))
        keys = [store.key(tokens) for tokens in np.concatenate([sequences(20), unknown, unknown])]
        coverage = store.coverage(keys)
        assert (coverage.present, coverage.total) == (20, 21)
        assert str(coverage) == "95.2 % (20 of 21 sequences)"


def test_coverage_rounds_down_so_that_one_missing_row_shows() -> None:
    from latentforge.targets import Coverage

    assert str(Coverage(99_999, 100_000)).startswith("99.9 %")
    assert str(Coverage(5, 5)).startswith("100.0 %")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"identity": {**IDENTITY, "sha256": "ef" * 32}}, f"teacher sha256 '{'ab' * 32}', not for '{'ef' * 32}'"),
        ({"identity": {**IDENTITY, "quantization": "bfloat16"}}, "quantization 'float32', not for 'bfloat16'"),
        ({"k": 8}, "k 4, not for 8"),
        ({"temperatures": [1.0]}, "temperatures [1.0, 2.0], not for [1.0]"),
        ({"vocab_size": 301}, "vocab_size 300, not for 301"),
    ],
)
def test_a_store_made_for_something_else_is_refused_with_both_values(
    filled: Path, asked: dict[str, Any], said: str
) -> None:
    for readonly in (True, False):
        with pytest.raises(RefusedError) as caught:
            TargetStore.open(filled, readonly=readonly, **asked)
        assert said in str(caught.value)
    assert sorted(p.name for p in filled.parent.iterdir() if not p.name.startswith("targets.sqlite-")) == [filled.name]


def test_keys_depend_on_teacher_parameters_and_tokens(tmp_path: Path) -> None:
    tokens = sequences(1)[0]
    keys = set()
    for number, changed in enumerate(
        [{}, {"k": 5}, {"temperatures": [1.0]}, {"identity": {**IDENTITY, "model": "other"}}, {"vocab_size": 301}]
    ):
        with create(tmp_path / f"{number}.sqlite", **changed) as store:
            keys |= {store.key(tokens), store.key(tokens[:-1]), store.key(tokens[::-1])}
            assert store.key(tokens.astype(np.int32)) == store.key(tokens.astype(np.uint16)), "the width is no meaning"
    assert len(keys) == 15


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"k": 0}, "k = 0"),
        ({"k": 301}, "k = 301 does not fit a vocabulary of 300"),
        ({"temperatures": []}, "temperatures"),
        ({"temperatures": [0.0]}, "temperatures"),
        ({"temperatures": [1.0, 1.0]}, "temperatures"),
        ({"temperatures": [float("nan")]}, "temperatures"),
    ],
)
def test_parameters_that_make_no_store_are_refused_and_leave_no_file(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(RefusedError, match=said):
        create(tmp_path / "targets.sqlite", **changed)
    assert not list(tmp_path.iterdir())


def broken(tokens: np.ndarray, what: str) -> SequenceTargets:
    row = targets_of(tokens)
    ids, logprobs, tails = row.ids.copy(), row.logprobs.copy(), {t: tail.copy() for t, tail in row.tails.items()}
    if what == "nan":
        logprobs[3, 1] = np.nan
    elif what == "order":
        logprobs[3] = logprobs[3, ::-1]
    elif what == "id":
        ids[0, 0] = VOCABULARY
    elif what == "negative":
        ids[0, 0] = -1
    elif what == "tail":
        tails[1.0] += 1.0
    elif what == "position":
        return SequenceTargets(ids[1:], logprobs[1:], {t: tail[1:] for t, tail in tails.items()})
    elif what == "temperature":
        del tails[2.0]
    elif what == "k":
        ids = ids[:, :3]
    return SequenceTargets(ids, logprobs, tails)


@pytest.mark.parametrize("what", ["nan", "order", "id", "negative", "tail", "position", "temperature", "k"])
def test_targets_that_no_teacher_can_have_said_are_refused_and_nothing_is_written(tmp_path: Path, what: str) -> None:
    tokens = sequences(2)
    with create(tmp_path / "targets.sqlite") as store:
        with pytest.raises(RefusedError):
            store.put_many([(tokens[0], targets_of(tokens[0])), (tokens[1], broken(tokens[1], what))])
        assert store.stats()["rows"] == 0


def test_tokens_outside_the_vocabulary_have_no_key(filled: Path) -> None:
    with TargetStore.open(filled) as store:
        for wrong in (np.array([1, VOCABULARY]), np.array([-1, 2]), np.array([[1, 2]])):
            with pytest.raises(RefusedError, match="not one sequence"):
                store.key(wrong)


def test_keys_of_a_batch_are_those_of_its_rows(filled: Path) -> None:
    with TargetStore.open(filled) as store:
        batch = sequences(20)
        assert store.keys(batch) == store.keys(list(batch)) == [store.key(tokens) for tokens in batch]
        assert store.keys(batch[:, ::2]) == [store.key(tokens[::2]) for tokens in batch]
        for wrong in (-1, VOCABULARY):
            batch[3, 2] = wrong
            with pytest.raises(RefusedError, match="ids below 300"):
                store.keys(batch)


def test_statistics_give_the_mass_outside_the_top_k(filled: Path) -> None:
    with TargetStore.open(filled) as store:
        stats = store.stats()
    assert stats["rows"] == 20
    mass = [np.exp(targets_of(t).tails[1.0].astype(np.float64)).mean() for t in sequences(20)]
    assert stats["tail_mass"]["1"] == pytest.approx(np.mean(mass), abs=1e-5)
    assert stats["tail_mass"]["2"] > stats["tail_mass"]["1"]


def test_writing_a_sequence_again_keeps_one_row(filled: Path) -> None:
    tokens = sequences(1)[0]
    with TargetStore.open(filled, readonly=False) as store:
        assert store.put_many([(tokens, targets_of(tokens))]) == 0
        assert store.stats()["rows"] == 20


def test_every_changed_byte_of_a_row_is_refused() -> None:
    key, row = b"k" * 32, targets_of(sequences(1)[0])
    value = pack_row(key, row)
    assert same(unpack_row(key, value, temperatures=TEMPERATURES), row)
    for at in range(len(value)):
        wrong = value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]
        with pytest.raises(RefusedError, match="damaged"):
            unpack_row(key, wrong, temperatures=TEMPERATURES)
        with pytest.raises(RefusedError, match="damaged"):
            unpack_row(key, value[:at], temperatures=TEMPERATURES)
    with pytest.raises(RefusedError, match="damaged"):
        unpack_row(b"K" * 32, value, temperatures=TEMPERATURES)


def test_a_vocabulary_above_65536_keeps_whole_ids(tmp_path: Path) -> None:
    tokens = np.array([70_000, 1, 151_935])
    row = SequenceTargets(
        np.array([[151_935, 65_536], [65_535, 0]], dtype=np.int32),
        np.log(np.array([[0.5, 0.25], [0.5, 0.25]], dtype=np.float32)),
        {1.0: np.log(np.full(2, 0.25, dtype=np.float32))},
    )
    with create(tmp_path / "t.sqlite", k=2, temperatures=[1.0], vocab_size=151_936) as store:
        store.put_many([(tokens, row)])
        assert same(store.get(tokens), row)


@pytest.mark.parametrize("content", [b"", b"not a database, but long enough to be looked at" * 40])
def test_a_file_that_is_no_store_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "targets.sqlite").write_bytes(content)
    with pytest.raises(RefusedError, match=r"targets\.sqlite"):
        TargetStore.open(tmp_path / "targets.sqlite")
    with pytest.raises(RefusedError, match="does not exist"):
        TargetStore.open(tmp_path / "absent.sqlite")


@pytest.mark.parametrize("part", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_store_that_was_cut_short_gives_right_rows_or_a_refusal(filled: Path, part: float) -> None:
    content = filled.read_bytes()
    filled.write_bytes(content[: int(len(content) * part)])
    refused = 0
    try:
        with TargetStore.open(filled) as store:
            for tokens in sequences(20):
                try:
                    assert same(store.get(tokens), targets_of(tokens))
                except RefusedError:
                    refused += 1
    except RefusedError:
        refused += 1
    assert refused


@pytest.fixture(scope="module")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("s") / "targets.sqlite"
    with create(path) as store:
        store.put_many((tokens, targets_of(tokens)) for tokens in sequences(6))
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
        with TargetStore.open(path) as store:
            # A store whose own description was altered derives other keys and finds nothing.
            for tokens in sequences(6):
                try:
                    assert same(store.get(tokens), targets_of(tokens))
                except RefusedError:
                    continue
    except RefusedError:
        pass


def test_a_store_that_is_still_written_is_read_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "targets.sqlite"
    with create(path) as store:
        store.put_many((tokens, targets_of(tokens)) for tokens in sequences(2))
        with TargetStore.open(path) as beside:
            assert beside.stats()["rows"] == 2
            store.put_many((tokens, targets_of(tokens)) for tokens in sequences(2, seed=1))
            assert same(beside.get(sequences(1, seed=1)[0]), targets_of(sequences(1, seed=1)[0]))
    with TargetStore.open(path) as store:
        assert store.stats()["rows"] == 4


_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_store import IDENTITY, create, sequences, targets_of
with create(Path(sys.argv[1])) as store:
    for number in range(10_000):
        store.put_many((tokens, targets_of(tokens)) for tokens in sequences(3, seed=number))
        print(number, flush=True)
"""


@pytest.mark.parametrize("after", [0, 1, 17])
def test_a_writer_killed_at_any_moment_leaves_only_rows_that_read_right(tmp_path: Path, after: int) -> None:
    path = tmp_path / "targets.sqlite"
    command = [sys.executable, "-c", _WRITER, str(path), str(Path(__file__).parent)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as job:
        assert job.stdout is not None
        for line in job.stdout:
            if int(line) >= after:
                break
        job.send_signal(signal.SIGKILL)
    with TargetStore.open(path, readonly=False, identity=IDENTITY, k=K, temperatures=TEMPERATURES) as store:
        read = 0
        for number in range(after + 1):
            for tokens in sequences(3, seed=number):
                assert same(store.get(tokens), targets_of(tokens)), "what was committed is there and right"
                read += 1
        rows = store.stats()["rows"]
        assert read <= rows
        assert rows % 3 == 0, "a transaction is there whole or not at all"
    assert [p.name for p in tmp_path.iterdir()] == ["targets.sqlite"]


def test_a_half_made_store_does_not_stop_the_next_attempt(tmp_path: Path) -> None:
    partial = tmp_path / "targets.sqlite.partial"
    sqlite3.connect(partial).execute("CREATE TABLE meta (value TEXT)").connection.close()
    create(tmp_path / "targets.sqlite").close()
    assert [p.name for p in tmp_path.iterdir()] == ["targets.sqlite"]
