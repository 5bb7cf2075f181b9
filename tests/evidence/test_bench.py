"""The figures of verification can be made again by one command, on ledgers and runs that do verify."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from latentforge.evidence.bench import large_run, long_ledger, main, seconds_of
from latentforge.evidence.ledger import read_chain
from latentforge.evidence.verify import verify_evidence


def test_the_command_prints_both_figures_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-m", "latentforge.evidence.bench", "50", "1"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert re.fullmatch(r"ledger of 50 entries: [\d.]+ s, [\d.]+ s of it computing", said[0])
    assert said[1].startswith("run of 1 MB: ")
    assert list(tmp_path.iterdir()) == []


def test_verification_reads_weights_no_more_than_twice(tmp_path: Path) -> None:
    run_dir = large_run(tmp_path, 8)
    files = sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file())
    before = read_characters()
    verify_evidence(run_dir)
    assert read_characters() - before < 2 * files + 2_000_000


def test_the_bench_makes_what_it_says(tmp_path: Path) -> None:
    long_ledger(tmp_path / "runs", 20)
    assert len(read_chain(tmp_path / "runs" / "ledger.jsonl").entries) == 20
    assert seconds_of(lambda: None)[0] >= 0


@pytest.mark.soak
def test_ten_thousand_entries_and_a_large_run_verify_within_their_bounds() -> None:
    ledger, run = main(10_000, 1000)
    print(ledger, run, sep="\n")
    computing = [float(re.findall(r"([\d.]+) s of it", line)[0]) for line in (ledger, run)]
    hashing = float(re.findall(r"once takes ([\d.]+)", run)[0])
    assert computing[0] < 5
    assert computing[1] < 2 + 2 * hashing


def read_characters() -> int:
    """Bytes that this process has read so far."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
