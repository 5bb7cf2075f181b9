"""Records in preallocated blocks: whole or absent, also on a full disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatch.agent import durable, exitrec

_RECORD = exitrec.encode({"run": "data-0", "code": 0, "outcome": "pass"})
_DOCUMENTS = st.dictionaries(st.text(max_size=10), st.integers() | st.text(max_size=50) | st.none(), max_size=10)


@given(_DOCUMENTS)
def test_a_record_reads_back_as_written(document: dict[str, object]) -> None:
    assert exitrec.decode(exitrec.encode(document)) == document


def test_a_record_torn_at_any_byte_reads_as_absent() -> None:
    for end in range(exitrec.SIZE):
        assert exitrec.decode(_RECORD[:end]) is None
        torn = _RECORD[:end] + bytes(exitrec.SIZE - end)
        assert exitrec.decode(torn) in (None, exitrec.decode(_RECORD) if torn == _RECORD else None)


@given(st.integers(0, exitrec.SIZE * 8 - 1))
def test_a_record_with_any_flipped_bit_reads_as_absent(bit: int) -> None:
    data = bytearray(_RECORD)
    data[bit // 8] ^= 1 << bit % 8
    assert exitrec.decode(bytes(data)) is None


@given(st.binary(max_size=200))
def test_bytes_that_are_no_record_read_as_absent(data: bytes) -> None:
    assert exitrec.decode(data) is None
    assert exitrec.decode(data.ljust(exitrec.SIZE, b"\0")) is None


def test_a_preallocated_record_is_absent_until_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "exit.rec"
    assert exitrec.read(path) is None
    exitrec.preallocate(path)
    assert path.stat().st_blocks * 512 >= exitrec.SIZE
    assert exitrec.read(path) is None
    exitrec.write(path, {"code": 0})
    exitrec.preallocate(path)
    assert exitrec.read(path) == {"code": 0}


def test_a_document_too_long_for_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4052"):
        exitrec.write(tmp_path / "exit.rec", {"reason": "x" * exitrec.SIZE})


def fill(folder: Path) -> None:
    """Leave no block free."""
    with open(folder / "filler", "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def test_an_exit_record_is_written_on_a_full_disk_where_a_new_file_is_not(small_disk: Path) -> None:
    exitrec.preallocate(small_disk / "exit.rec")
    fill(small_disk)
    with pytest.raises(OSError, match="No space"):
        durable.write_json(small_disk / "artifacts.json", {"files": ["x" * 5000]})
    assert sorted(os.listdir(small_disk)) == ["exit.rec", "filler"]
    exitrec.write(small_disk / "exit.rec", {"code": 0, "outcome": "unknown"})
    assert exitrec.read(small_disk / "exit.rec") == {"code": 0, "outcome": "unknown"}


def test_a_line_after_one_that_a_full_disk_tore_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    durable.append_line(path, {"event": "launching"})
    with path.open("ab") as file:
        file.write(b'{"event":"disk-l')
    durable.append_line(path, {"event": "started"})
    assert path.read_text().splitlines() == ['{"event":"launching"}', '{"event":"disk-l', '{"event":"started"}']
