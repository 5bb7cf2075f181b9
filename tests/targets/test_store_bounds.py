"""A store in bounds: age, size, readers beside a writer, full disks, kills at any moment, and stores of before."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import sqlite3
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from typer.testing import CliRunner

from latentforge.errors import FailedError, RefusedError
from latentforge.targets import SequenceTargets, TargetStore

IDENTITY = {"model": "M", "sha256": "ab" * 32, "quantization": "float32", "tokenizer_sha256": "cd" * 32}
K, LENGTH, VOCABULARY = 8, 17, 3000


def tokens_of(number: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(number)).integers(0, VOCABULARY, LENGTH)


def targets_of(tokens: np.ndarray) -> SequenceTargets:
    """Rows that follow from the tokens, so that a reader can tell right from wrong; their numbers are levels."""
    generator = np.random.Generator(np.random.PCG64(int(tokens.sum())))
    ids = np.stack([generator.choice(VOCABULARY, K, replace=False) for _ in range(LENGTH - 1)]).astype(np.int32)
    logprobs = np.log(np.tile(0.5 ** np.arange(1, K + 1), (LENGTH - 1, 1))).astype(np.float32)
    return SequenceTargets(ids, logprobs, {1.0: np.full(LENGTH - 1, K * np.log(0.5), np.float32)})


def create(path: Path, **more: Any) -> TargetStore:
    return TargetStore.create(path, IDENTITY, K, [1.0], vocab_size=VOCABULARY, **more)


def put(store: TargetStore, *numbers: int) -> int:
    return store.put_many([(tokens_of(n), targets_of(tokens_of(n))) for n in numbers])


def has(store: TargetStore, *numbers: int) -> list[int]:
    present = store.present([store.key(tokens_of(n)) for n in numbers])
    return [n for n in numbers if store.key(tokens_of(n)) in present]


def right(store: TargetStore, number: int) -> bool:
    return np.array_equal(store.get(tokens_of(number)).ids, targets_of(tokens_of(number)).ids)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_row_that_is_too_old_is_not_there_and_is_stored_anew(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "t.sqlite"
    with create(path, ttl_seconds=100.0, clock=clock) as store:
        put(store, 1)
        clock.now += 60
        put(store, 2)
        assert right(store, 1), "and now it lies in memory"
        clock.now += 41
        assert has(store, 1, 2) == [2]
        with pytest.raises(RefusedError, match="no targets for 1 of 1"):
            store.get(tokens_of(1))
        assert (store.stats()["rows"], store.stats()["too_old"]) == (1, 1)
        assert put(store, 1) == 1, "scored again"
        assert has(store, 1, 2) == [1, 2]
        clock.now += 99
        assert store.prune().old == 1
        assert has(store, 1, 2) == [1]
    with TargetStore.open(path, clock=clock) as reader:
        assert reader.policy.ttl_seconds == 100.0
        clock.now += 10
        assert has(reader, 1) == []


def test_a_bound_store_never_grows_above_it_and_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    path, bound = tmp_path / "t.sqlite", 90_000
    with create(path, max_bytes=bound) as store:
        for number in range(90):
            put(store, number)
            assert right(store, 0), "asked for at each step, so the last to go"
            assert right(store, number)
        left = has(store, *range(90))
        assert 20 < len(left) < 89
        assert left == [0, *range(90 - len(left) + 1, 90)]
        with pytest.raises(RefusedError, match="do not fit"):
            put(store, *range(1000, 1400))
        assert has(store, *reversed(range(90))) == left[::-1], "a transaction that is refused evicts nothing"
    assert path.stat().st_size <= bound
    with TargetStore.open(path, readonly=False) as store:
        before = path.stat().st_size
        assert store.prune(max_bytes=70_000).evicted > 0
        kept = has(store, *range(90))
        assert kept == left[: len(kept)], "what was used last, in the order of asking, is remembered over a restart"
    assert path.stat().st_size <= 70_000 < before


def test_a_writer_keeps_the_limits_that_another_process_gives_the_store(tmp_path: Path) -> None:
    """Who prunes a cache that a long run fills means the run as well: "from now on" is not from its next start."""
    path, clock = tmp_path / "t.sqlite", Clock()
    with create(path, clock=clock) as writer:
        put(writer, 0)
        with TargetStore.open(path, readonly=False, clock=clock) as other:
            other.prune(max_bytes=90_000, ttl_seconds=100.0)
        for number in range(1, 120):
            put(writer, number)
        assert writer.stats()["rows"] < 120, "what was used longest ago made room"
        clock.now += 101.0
        assert put(writer, 119) == 1, "it was too old, and is stored anew"
    assert path.stat().st_size <= 90_000


def test_reading_beside_a_writer_changes_no_byte(tmp_path: Path) -> None:
    def state() -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.iterdir()}

    path = tmp_path / "t.sqlite"
    with create(path) as store:
        put(store, 1, 2)
        before = state()
        assert {"t.sqlite-wal", "t.sqlite-shm"} < set(before)
        with python(_READER, path, stdin=subprocess.PIPE) as other:
            assert other.communicate("1\n2\n")[0] == "open\n2 ()\n"
        assert state() == before
    reader = TargetStore.open(path)
    assert right(reader, 1)
    with TargetStore.open(path, readonly=False) as store:
        put(store, 3)
        assert right(reader, 3), "a reader that was there before the writer sees what it commits"
    assert right(reader, 2)
    reader.close()


_WRITER = """
import sys
from contextlib import suppress
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_store_bounds import *
with TargetStore.open(Path(sys.argv[2]), readonly=False) as store:
    for number in range(int(sys.argv[3]), 10**9):
        put(store, number)
        print(number, flush=True)
"""

_READER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_store_bounds import *
store = TargetStore.open(Path(sys.argv[2]))
print("open", flush=True)
reads = 0
for line in sys.stdin:
    assert right(store, int(line)), line
    reads += 1
print(reads, store.check().damaged, flush=True)
"""


def python(code: str, *arguments: object, **more: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(Path(__file__).parent), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **more)


def test_many_processes_read_every_row_as_soon_as_it_is_committed(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    create(path).close()
    readers = [python(_READER, path, stdin=subprocess.PIPE) for _ in range(3)]
    with python(_WRITER, path, 0) as writer:
        assert writer.stdout is not None
        assert [r.stdout.readline() for r in readers if r.stdout] == ["open\n"] * 3
        for _ in range(40):
            line = writer.stdout.readline()
            for reader in readers:
                assert reader.stdin is not None
                reader.stdin.write(line)
                reader.stdin.flush()
        answers = [reader.communicate()[0].strip() for reader in readers]
        writer.kill()
    assert answers == ["40 ()"] * 3
    assert [reader.returncode for reader in readers] == [0, 0, 0]


def killed_at_random(path: Path, kills: int, seed: int) -> tuple[int, int]:
    """Writers killed after a random time each; (rows committed, rows found), and nothing read wrong."""
    dice = random.Random(seed)
    create(path).close()
    told = 0
    for _ in range(kills):
        with python(_WRITER, path, told) as writer:
            assert writer.stdout is not None
            lines = dice.randrange(1, 12)
            for line in writer.stdout:
                told = int(line) + 1
                lines -= 1
                if lines == 0:
                    break
            # Not at a line: anywhere in the work on the next rows.
            for _ in range(dice.randrange(0, 40_000)):
                pass
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().split("\n")
            told = max([told, *(int(line) + 1 for line in rest[:-1] if line)])
        with TargetStore.open(path) as reader:
            assert reader.check().good
            assert all(right(reader, number) for number in range(told)), "what was said to be stored is"
    with TargetStore.open(path, readonly=False) as store:
        found = store.stats()["rows"]
        assert store.check().good
    return told, found


def test_writers_killed_at_random_lose_at_most_the_row_in_flight(tmp_path: Path) -> None:
    told, found = killed_at_random(tmp_path / "t.sqlite", 4, seed=11)
    # One row a killed writer may have been committed and not told.
    assert told <= found <= told + 4
    assert [p.name for p in tmp_path.iterdir()] == ["t.sqlite"]


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_many_writers_killed_at_random(tmp_path: Path, seed: int) -> None:
    told, found = killed_at_random(tmp_path / "t.sqlite", 25, seed=seed)
    assert told <= found <= told + 25


def test_what_a_killed_writer_left_is_read_without_touching_it(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    create(path).close()
    with python(_WRITER, path, 0) as writer:
        assert writer.stdout is not None
        for _ in range(3):
            writer.stdout.readline()
        writer.kill()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert len(before["t.sqlite-wal"]) > 0
    with TargetStore.open(path) as reader:
        assert has(reader, 0, 1, 2) == [0, 1, 2]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    (tmp_path / "t.sqlite-shm").unlink()
    with pytest.raises(RefusedError, match="wal holds what is not in it") as caught:
        TargetStore.open(path)
    assert "targets prune" in str(caught.value.next)
    TargetStore.open(path, readonly=False).close()
    with TargetStore.open(path) as reader:
        assert has(reader, 0, 1, 2) == [0, 1, 2]


_JOURNAL = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[2], isolation_level=None)
connection.execute("PRAGMA journal_mode=DELETE")
connection.execute(f"PRAGMA cache_size={sys.argv[3]}")
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE rows SET value = randomblob(9000)")
assert os.path.getsize(sys.argv[2] + "-journal")
print("journal", flush=True)
sys.stdin.readline()
"""


def with_journal(path: Path, pages: int) -> subprocess.Popen[str]:
    """A writer in the middle of a transaction, with such a journal as opening and closing a store makes."""
    writer = python(_JOURNAL, path, pages, stdin=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "journal\n"
    return writer


def test_the_journal_of_a_writer_that_lives_is_no_reason_to_refuse_its_store(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    with create(path) as store:
        put(store, 0, 1)
    with with_journal(path, 1000) as writer, TargetStore.open(path) as reader:
        assert [right(reader, number) for number in (0, 1)] == [True, True]
        writer.kill()


def test_the_journal_of_a_writer_that_died_is_named_and_nothing_is_read_under_it(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    with create(path) as store:
        put(store, *range(20))
    # With room for one page in memory, changed pages are in the file before the end of the transaction.
    with with_journal(path, 1) as writer:
        writer.kill()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(RefusedError, match="journal holds what is not in it") as caught:
        TargetStore.open(path)
    assert "targets prune" in str(caught.value.next)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    TargetStore.open(path, readonly=False).close()
    with TargetStore.open(path) as reader:
        assert all(right(reader, number) for number in range(20))


def test_a_writer_that_opens_under_a_readers_eyes_is_not_taken_for_one_that_died(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    create(path).close()
    opened = 0
    with python(_OPENER, path) as writer:
        assert writer.stdout is not None
        while writer.poll() is None:
            TargetStore.open(path).close()
            opened += 1
        assert writer.returncode == 0
    assert opened > 100


def test_what_was_read_while_the_file_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.sqlite"
    with create(path) as store:
        put(store, *range(20))
    # As it is while somebody has it open: a journal is expected. None is there, so it is read without locks.
    whole = path.read_bytes()
    whole = whole[:18] + b"\x02\x02" + whole[20:]
    path.write_bytes(whole)
    with TargetStore.open(path) as reader:
        # A writer that has changed a part of it, and the rest as soon as the reader waits.
        path.write_bytes(whole[:1024] + b"\xff" * 4096 + whole[5120:])
        waited: list[float] = []
        monkeypatch.setattr(
            "latentforge.targets.connection.time.sleep", lambda s: (waited.append(s), path.write_bytes(whole))
        )
        assert all(right(reader, number) for number in range(20))
    assert waited


def test_a_writer_that_opens_waits_for_one_that_is_changing_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.sqlite"
    with create(path) as store:
        put(store, 0)
    with with_journal(path, 1000) as other:
        waited: list[float] = []
        monkeypatch.setattr(
            "latentforge.targets.connection.time.sleep", lambda s: (waited.append(s), other.communicate("\n"))
        )
        with TargetStore.open(path, readonly=False) as store:
            assert put(store, 1) == 1
            assert [right(store, number) for number in (0, 1)] == [True, True]
    assert len(waited) == 1


_OPENER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_store_bounds import *
for number in range(100):
    with TargetStore.open(Path(sys.argv[2]), readonly=False) as store:
        put(store, number)
"""


def put_until_full(store: TargetStore, number: int) -> tuple[int, FailedError]:
    while True:
        try:
            put(store, number)
        except FailedError as error:
            return number, error
        number += 1


def test_a_full_disk_is_an_error_that_loses_nothing_that_was_stored(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    with create(path) as store:
        put(store, *range(20))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = TargetStore.open(path, readonly=False)
    stored = 20
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30_000, hard))
        stored, error = put_until_full(store, stored)
        assert "cannot grow: no space on its disk" in str(error)
        assert "only what is missing" in str(error.next)
        assert 20 < stored < 400
        assert right(store, 3), "still read"
        with suppress(FailedError):
            store.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with TargetStore.open(path, readonly=False) as store:
        assert all(right(store, number) for number in range(stored))
        assert store.check().good
        assert put(store, stored) == 1, "with room it goes on"


def test_a_store_that_cannot_be_made_for_want_of_space_leaves_no_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        with pytest.raises(FailedError, match="cannot grow"):
            create(tmp_path / "t.sqlite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [p for p in tmp_path.iterdir() if not p.name.endswith("-journal")]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"mode": "sample"}, "sampled rows need both"),
        ({"mode": "sample", "draws": 50}, "sampled rows need both"),
        ({"draws": 5}, "top-k rows are not drawn"),
        ({"mode": "other"}, "neither 'topk' nor 'sample'"),
        ({"ttl_seconds": 0.0}, "ttl_seconds = 0"),
        ({"max_bytes": 10}, "max_bytes = 10 is below"),
        ({"max_bytes": 2**63}, "max_bytes = 9223372036854775808 is above"),
    ],
)
def test_modes_and_limits_that_no_store_can_have_are_refused(tmp_path: Path, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        create(tmp_path / "t.sqlite", **asked)
    assert not list(tmp_path.iterdir())


def old_store(path: Path) -> None:
    """A store as the version before wrote it: schema 1, rows of format LFT1."""
    meta = {"schema": 1, "identity": IDENTITY, "k": 2, "temperatures": [1.0], "vocab_size": VOCABULARY}
    text = json.dumps(meta, sort_keys=True, separators=(",", ":"))
    key = hashlib.sha256(text.encode() + np.array([1, 2], "<u4").tobytes()).digest()
    head = struct.pack("<4sBxHII", b"LFT1", 2, 1, 1, 2)
    ids = np.array([[700, 5]], "<u2").reshape(-1).view(np.uint8).reshape(-1, 2).T.tobytes()
    logprobs = np.array([-0.5, -1.5], "<f4").view(np.uint8).reshape(-1, 4).T.tobytes()
    tail = np.array([-1.75], "<f4").tobytes()
    packed = zstandard.ZstdCompressor(level=3).compress(ids + logprobs + tail)
    check = hashlib.blake2b(packed, digest_size=16, key=hashlib.sha256(key + head).digest()).digest()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE meta (value TEXT NOT NULL)")
        connection.execute("CREATE TABLE rows (key BLOB PRIMARY KEY, value BLOB NOT NULL, mass BLOB NOT NULL)")
        connection.execute("INSERT INTO meta VALUES (?)", (text,))
        mass = np.array([0.17]).tobytes()
        connection.execute("INSERT INTO rows VALUES (?, ?, ?)", (key, head + check + packed, mass))
    connection.close()


def test_a_store_of_the_version_before_is_read_and_not_written(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    old_store(path)
    before = path.read_bytes()
    with TargetStore.open(path, identity=IDENTITY, k=2) as store:
        row = store.get(np.array([1, 2]))
        assert row.ids.tolist() == [[700, 5]]
        assert row.logprobs.tolist() == [[-0.5, -1.5]]
        assert row.tails[1.0].tolist() == [-1.75]
        assert store.check().good
        assert store.stats()["schema"] == 1
    with pytest.raises(RefusedError, match="written by an earlier version") as caught:
        TargetStore.open(path, readonly=False)
    assert "score into a new store" in str(caught.value.next)
    assert path.read_bytes() == before


def test_the_commands_show_check_and_prune_a_store(tmp_path: Path) -> None:
    from latentforge.cli.targets import app

    path, run = tmp_path / "t.sqlite", CliRunner().invoke
    with create(path) as store:
        put(store, *range(9))
    shown = run(app, ["stats", str(path)])
    assert "9 sequences, topk k = 8, T = 1" in shown.output
    assert json.loads(run(app, ["stats", str(path), "--json"]).output)["rows"] == 9
    assert "9 rows read, 0 damaged" in run(app, ["check", str(path)]).output
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE rows SET value = substr(value, 1, 90) WHERE rowid = 4")
    connection.close()
    said = json.loads(run(app, ["check", str(path), "--json"]).output)
    assert (said["rows"], len(said["damaged"]), said["dropped"]) == (9, 1, 0)
    assert "1 dropped" in run(app, ["check", str(path), "--drop"]).output
    pruned = json.loads(run(app, ["prune", str(path), "--ttl-days", "0.0000001", "--json"]).output)
    assert (pruned["old"], pruned["rows"]) == (8, 0)
    for refused in ("0", "-1", "nan", "1e308"):
        with pytest.raises(RefusedError, match=f"--ttl-days {float(refused):g} is not".replace("+", "\\+")):
            run(app, ["prune", str(path), f"--ttl-days={refused}"], catch_exceptions=False)
