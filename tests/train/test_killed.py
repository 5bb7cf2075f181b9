"""A run that is killed at any point and begun again is, bit for bit, the one that was not killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latentforge.events import read_events, standing
from latentforge.evidence.digests import file_sha256
from latentforge.spec.run import RunDir

KINDS = ("teacher", "autoencoder", "distill", "latent")
SEED = int(os.environ.get("LATENTFORGE_SEED", time.time_ns() % 2**32))
TIMES = {"seconds", "tokens_per_second", "memory_bytes", "peak_memory_bytes", "stood_seconds"}
Start = Callable[..., dict[str, int]]


@pytest.fixture(scope="module")
def ask() -> Iterator[Start]:
    """Start a run folder, and be told how it ended and how many points it passed."""
    command = [sys.executable, str(Path(__file__).with_name("dying.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def start(run: RunDir, *, kill_at: int | None = None, restarted: int = 0) -> dict[str, int]:
            print(json.dumps({"folder": str(run.path), "kill_at": kill_at, "restarted": restarted}), file=process.stdin)
            process.stdin.flush()
            found: dict[str, int] = json.loads(process.stdout.readline())
            return found

        yield start
        process.stdin.close()


def of_a_run(event: Any) -> str | None:
    """What an event says of a step or a value, without the times that it took."""
    if event.kind not in ("step", "metric"):
        return None
    kept = {name: value for name, value in event.fields.items() if name not in TIMES and "seconds" not in name}
    return json.dumps({"kind": event.kind, **kept}, sort_keys=True)


def said_of(run: RunDir) -> set[str]:
    """The steps (losses, learning rates, gradient norms, batches) and the held-out values that stand."""
    found = [of_a_run(event) for event in standing(read_events(run.events_file))]
    lines = [line for line in found if line is not None]
    assert len(lines) == len(set(lines)), "a step or a value stands twice"
    return set(lines)


def left_by(run: RunDir) -> dict[str, str]:
    """What the run left below ``out`` but for what is said of it in words, by digest."""
    files = [path for path in run.out.rglob("*") if path.is_file() and path.name != "metrics.json"]
    return {path.relative_to(run.out).as_posix(): file_sha256(path) for path in files}
