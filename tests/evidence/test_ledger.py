"""The ledger: appended, chained, never changed."""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentforge.errors import FailedError, RefusedError
from latentforge.evidence.ledger import FIRST, Chain, Entry, append, check_chain, read_chain
from latentforge.spec.canonical import canonical_bytes


def run_id(number: int) -> str:
    return f"distill-{number:020x}"


def lines(count: int) -> list[bytes]:
    """A whole ledger of that many entries."""
    made, head = [], FIRST
    for number in range(1, count + 1):
        made.append(Entry(number, head, run_id(number), f"{number:064x}", "2026-11-19T14:02:00Z").line)
        head = hashlib.sha256(made[-1]).hexdigest()
    return made


CONTENT = b"".join(lines(4))


def test_each_line_holds_the_digest_of_the_line_before(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for number in (1, 2, 3):
        append(path, run_id(number), f"{number:064x}")
    first, second, third = path.read_bytes().splitlines(keepends=True)
    chain = read_chain(path)
    assert [entry.entry for entry in chain.entries] == [1, 2, 3]
    assert [entry.prev for entry in chain.entries] == [
        FIRST,
        hashlib.sha256(first).hexdigest(),
        hashlib.sha256(second).hexdigest(),
    ]
    assert chain.head == hashlib.sha256(third).hexdigest()


def test_a_run_is_entered_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    append(path, run_id(1), "0" * 64)
    before = path.read_bytes()
    with pytest.raises(RefusedError, match="written once"):
        append(path, run_id(1), "1" * 64)
    assert path.read_bytes() == before


@settings(max_examples=300)
@given(position=st.integers(0, len(CONTENT) - 1), flip=st.integers(1, 255))
def test_no_flipped_byte_goes_unnoticed(position: int, flip: int) -> None:
    changed = bytearray(CONTENT)
    changed[position] ^= flip
    with pytest.raises(FailedError):
        check_chain(bytes(changed))


@settings(max_examples=100)
@given(st.lists(st.integers(0, 3), max_size=5))
def test_lines_removed_repeated_or_reordered_are_noticed(order: list[int]) -> None:
    whole = lines(4)
    if order == list(range(len(order))):
        assert len(check_chain(b"".join(whole[i] for i in order)).entries) == len(order)
    else:
        with pytest.raises(FailedError):
            check_chain(b"".join(whole[i] for i in order))


def test_nothing_is_appended_to_a_ledger_that_was_altered(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(CONTENT.replace(b"14:02", b"15:02", 1))
    before = path.read_bytes()
    with pytest.raises(FailedError, match="line 1"):
        append(path, run_id(9), "0" * 64)
    assert path.read_bytes() == before


def test_a_torn_last_line_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FailedError, match="line 4 has no line end"):
        check_chain(CONTENT[:-20])


def test_a_line_that_is_rewritten_with_its_own_digest_breaks_the_link_after_it() -> None:
    whole = lines(3)
    forged = Entry(2, hashlib.sha256(whole[0]).hexdigest(), run_id(2), "f" * 64, "2026-11-19T14:02:00Z").line
    with pytest.raises(FailedError, match="line 3 links to"):
        check_chain(whole[0] + forged + whole[2])


def test_a_failed_write_leaves_the_ledger_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    append(path, run_id(1), "0" * 64)
    before = path.read_bytes()
    import os

    real = os.write
    monkeypatch.setattr("latentforge.evidence.ledger.os.write", lambda fd, data: real(fd, data[:30]))
    with pytest.raises(FailedError, match="only 30 of"):
        append(path, run_id(2), "0" * 64)
    assert path.read_bytes() == before


def _append_many(path: Path, begin: int, barrier: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    for number in range(begin, begin + 15):
        append(path, run_id(number), f"{number:064x}")


def test_processes_that_append_at_once_make_one_chain(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    path = tmp_path / "ledger.jsonl"
    workers = [context.Process(target=_append_many, args=(path, 100 * n, barrier)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(read_chain(path).entries) == 45


def test_ten_thousand_entries_are_checked_within_seconds_of_computing() -> None:
    content = b"".join(lines(10_000))
    began = time.process_time()
    chain: Chain = check_chain(content)
    assert len(chain.entries) == 10_000
    assert time.process_time() - began < 5


@given(entry=st.integers(0, 2**53 - 1), texts=st.tuples(st.text(), st.text(), st.text(), st.text()))
def test_a_line_is_canonical_json(entry: int, texts: tuple[str, str, str, str]) -> None:
    prev, run, manifest, wall = texts
    content = {"entry": entry, "prev": prev, "run": run, "manifest": manifest, "wall": wall}
    digest = hashlib.sha256(canonical_bytes(content)).hexdigest()
    assert Entry(entry, prev, run, manifest, wall).line == canonical_bytes({**content, "sha256": digest}) + b"\n"


@pytest.mark.parametrize("run", ["../elsewhere", "\ud800", "distill-1"])
def test_a_line_that_names_no_run_is_no_line(run: str) -> None:
    line = Entry(1, FIRST, run, "0" * 64, "2026-11-19T14:02:00Z").line
    with pytest.raises(FailedError, match="line 1"):
        check_chain(line)
    with pytest.raises(FailedError, match="line 1"):
        check_chain(line.replace(b'"?"', b'"\\ud800"'))
