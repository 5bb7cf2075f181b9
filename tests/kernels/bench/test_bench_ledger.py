"""The ledger takes whole rows under its own header, and nothing else."""

from __future__ import annotations

import csv
import multiprocessing
from pathlib import Path

import pytest

from latentforge.errors import RefusedError
from latentforge.kernels.bench import floor, ledger
from latentforge.kernels.bench.contest import Line
from latentforge.kernels.bench.machine import Machine
from latentforge.kernels.bench.report import Report, Section


def report(threads: int = 1, lines: int = 1) -> Report:
    measured = [Line(f"cpu, {i}", "ours", [2.0, 4.0, 3.0], error=1.5e-3) for i in range(lines)]
    some = Section(
        "kd_loss",
        "dense, forward KL and CE",
        {"N": 4, "V": 1000},
        "bf16",
        threads,
        2.0,
        floor.dense_kd(4, 1000, 2, ce=True),
        [*measured, Line("cuda", "ours", note="no CUDA device here")],
        {"add": 24e9},
    )
    machine = Machine("cpu", 'Xeon, "the" one', "x86_64", 2, "2.13.0", None, "a" * 64, "GNU 12", "avx512")
    return Report(machine, [some], "2026-11-21T10:00:00Z", "git:abc+")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_row_comes_back_as_it_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    assert ledger.append(path, report()) == 1
    assert ledger.append(path, report(threads=2)) == 1
    first, second = read(path)
    assert tuple(first) == ledger.COLUMNS
    assert first["processor"] == 'Xeon, "the" one'
    assert (first["op"], first["shape"], first["dtype"]) == ("kd_loss", "N=4 V=1000", "bf16")
    assert (first["floor_bytes"], first["median_ms"], first["turns"]) == ("24000", "3", "3")
    assert float(first["percent_of_floor"]) == pytest.approx(100 * 0.001 / 3, rel=1e-3)
    assert float(first["stream_gb_s"]) == 24
    assert (first["triton"], first["vs_eager"], first["source"]) == ("", "", "git:abc+")
    assert (first["threads"], second["threads"]) == ("1", "2")


def test_a_file_with_another_header_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    path.write_text("utc,op,median_ms\n2026,kd_loss,3\n")
    with pytest.raises(RefusedError, match="utc,op,median_ms"):
        ledger.append(path, report())
    assert path.read_text() == "utc,op,median_ms\n2026,kd_loss,3\n"


def test_a_header_that_only_begins_alike_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    path.write_text(",".join(ledger.COLUMNS) + ",more\n")
    with pytest.raises(RefusedError):
        ledger.append(path, report())


def test_a_torn_last_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    ledger.append(path, report())
    path.write_text(path.read_text()[:-5])
    torn = path.read_bytes()
    with pytest.raises(RefusedError, match="middle of a row"):
        ledger.append(path, report())
    assert path.read_bytes() == torn


def test_a_write_that_fails_leaves_no_half_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kernels.csv"
    ledger.append(path, report())
    before = path.read_bytes()
    write = ledger.os.write
    monkeypatch.setattr(ledger.os, "write", lambda handle, data: write(handle, data[:7]))
    with pytest.raises(OSError, match="7 of"):
        ledger.append(path, report())
    assert path.read_bytes() == before


def _append_often(path: str) -> None:
    for _ in range(20):
        ledger.append(Path(path), report(lines=3))


def test_rows_of_two_writers_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_often, args=(str(path),)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = read(path)
    assert len(found) == 3 * 20 * 3
    assert all(row["utc"] == "2026-11-21T10:00:00Z" and row["error"] == "1.500e-03" for row in found)


def test_the_committed_ledger_has_this_versions_columns() -> None:
    path = ledger.default_path()
    if path.exists():
        assert path.read_text(encoding="utf-8").splitlines()[0] == ",".join(ledger.COLUMNS)
