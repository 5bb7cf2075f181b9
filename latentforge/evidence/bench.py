"""How fast verification is here: a long ledger, and a run of large files beside the speed of hashing alone.

``python -m latentforge.evidence.bench [ENTRIES] [MEGABYTES]`` (10,000 and 256), in a folder that is removed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from latentforge.evidence.checks import planted_run
from latentforge.evidence.digests import file_sha256
from latentforge.evidence.ledger import FIRST, LEDGER, Entry
from latentforge.evidence.manifest import record
from latentforge.evidence.statement import build_statement
from latentforge.evidence.verify import verify_evidence
from latentforge.verdicts import Outcome


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """The seconds of a call by the clock and of computing (this process's own)."""
    wall, computed = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - computed


def long_ledger(folder: Path, entries: int) -> None:
    """A whole ledger of that many entries, none of whose runs is here."""
    head, lines = FIRST, []
    for number in range(1, entries + 1):
        lines.append(Entry(number, head, f"distill-{number:020x}", f"{number:064x}", "2026-11-19T14:02:00Z").line)
        head = hashlib.sha256(lines[-1]).hexdigest()
    folder.mkdir(parents=True)
    (folder / LEDGER).write_bytes(b"".join(lines))


def large_run(folder: Path, megabytes: int) -> Path:
    """A recorded run whose weights have that many megabytes, in one tensor."""
    run_dir = planted_run(folder)
    size = megabytes * 1_000_000
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"embed.weight": tensor}).encode()
    with open(run_dir / "out" / "student" / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(megabytes):
            file.write(os.urandom(1_000_000))
    record(run_dir, build_statement(run_dir, plan=None, host={}, dispatched={}, environ={}))
    return run_dir


def main(entries: int = 10_000, megabytes: int = 256) -> list[str]:
    """Measure both; what is printed."""
    with tempfile.TemporaryDirectory(prefix="latentforge-evidence-bench-") as scratch:
        ledger = Path(scratch) / "ledger"
        long_ledger(ledger, entries)
        whole = verify_evidence(ledger)
        assert whole.entries == entries
        assert not any(one.outcome is Outcome.FAIL for one in whole.problems)
        wall, computed = seconds_of(lambda: verify_evidence(ledger))
        lines = [f"ledger of {entries} entries: {wall:.2f} s, {computed:.2f} s of it computing"]
        run_dir = large_run(Path(scratch) / "runs", megabytes)
        weights = run_dir / "out" / "student" / "model.safetensors"
        assert verify_evidence(run_dir).outcome is Outcome.PASS
        hashed, _ = seconds_of(lambda: file_sha256(weights))
        wall, computed = seconds_of(lambda: verify_evidence(run_dir))
        lines.append(
            f"run of {megabytes} MB: {wall:.2f} s, {computed:.2f} s of it computing; hashing its weights once takes "
            f"{hashed:.2f} s ({megabytes / hashed:.0f} MB/s), which verification does twice (the file, its tensors)"
        )
        return lines


if __name__ == "__main__":
    import sys

    print("\n".join(main(*(int(one) for one in sys.argv[1:3]))))
