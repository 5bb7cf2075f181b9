"""A run that is killed at any point and begun again is, bit for bit, the one that was not killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latentforge.events import read_events, standing
from latentforge.evidence.digests import file_sha256
from latentforge.spec.resolve import resolve_pipeline
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.spec.teacher import ASKING, reach_of
from latentforge.train.inprocess import plan, record_artifacts

from .test_long_runs import TWIN

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


def judged(run: RunDir) -> list[tuple[str, str, str]]:
    """What the run was judged to be: no step that was made twice is counted twice."""
    found = [event.fields for event in read_events(run.events_file) if event.kind == "verdict"]
    return [(fields["falsifier"], fields["outcome"], fields["text"]) for fields in found]


def left_by(run: RunDir) -> dict[str, str]:
    """What the run left below ``out`` but for what is said of it in words, by digest."""
    files = [path for path in run.out.rglob("*") if path.is_file() and path.name != "metrics.json"]
    return {path.relative_to(run.out).as_posix(): file_sha256(path) for path in files}


@pytest.fixture(scope="module")
def whole(ask: Start, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunDir, int]]:
    """Every run of a pipeline that trains each kind of model, none of them killed, with the points that each passed."""
    asked = [
        "data.train_sequences=48",
        "data.heldout_sequences=8",
        "continuations.rows=32",
        "autoencoder.batch_size=8",
        "latent.beside=true",
        "latent.batch_size=8",
        "distill.batch_size=8",
        f"distill.require={json.dumps(TWIN)}",
        *(f"{section}.require=[]" for section in ("autoencoder", "latent")),
    ]
    sections = ("teacher", "autoencoder", "distill", "latent")
    each = {"steps": 6, "checkpoint_every": 2, "validate_every": 3, "keep": "'best'"}
    asked += [f"{section}.{name}={value}" for section in sections for name, value in each.items()]
    spec = resolve_pipeline("tiny-latent", env={}, overrides=asked).spec
    runs = tmp_path_factory.mktemp("whole") / "runs"
    runs.mkdir()
    found = {}
    for planned in plan(spec):
        reach = reach_of(spec.teacher) if planned.kind in ASKING else {}
        launch = LaunchRecord(planned.run_id, planned.kin, planned.resolved, reach=reach)
        run = RunDir.create(runs, planned.identity, launch)
        told = ask(run)
        assert told["ended"] in (0, 1), run.log_file.read_text()
        record_artifacts(run)
        found[planned.kind] = (run, told["points"])
    return found


def check(whole: tuple[RunDir, int], ask: Start, runs: Path, where: random.Random) -> None:
    """Kill a run at a point, perhaps begin it again and kill that at another, let it end, and compare it."""
    run, points = whole
    shutil.copytree(run.path.parent, runs, ignore=shutil.ignore_patterns(run.run))
    again = RunDir.create(runs, run.load_identity(), run.load_launch())
    kills: list[int | None] = [where.randrange(1, points + 1) for _ in range(where.choice((1, 1, 2)))]
    print(f"LATENTFORGE_SEED={SEED}: {run.kind} killed at point {kills} of {points}")
    for restarted, at in enumerate([*kills, None]):
        ended = ask(again, kill_at=at, restarted=restarted)["ended"]
        if ended >= 0:  # a second start may have fewer points before it than it was to be killed at
            break
    log = again.log_file.read_text()
    assert ended == read_events(run.events_file)[-1].fields["code"], log
    assert said_of(again) == said_of(run), log
    assert judged(again) == judged(run), log
    assert left_by(again) == left_by(run), log


@pytest.mark.parametrize("number", range(3))
def test_killed_at_a_random_point_and_begun_again_it_is_the_run_that_was_not(
    whole: dict[str, tuple[RunDir, int]], ask: Start, tmp_path: Path, number: int
) -> None:
    where = random.Random(SEED + number)
    check(whole[where.choice(KINDS)], ask, tmp_path / "runs", where)


@pytest.mark.soak
@pytest.mark.parametrize("number", range(20))
def test_the_same_at_twenty_points(
    whole: dict[str, tuple[RunDir, int]], ask: Start, tmp_path: Path, number: int
) -> None:
    check(whole[KINDS[number % 4]], ask, tmp_path / "runs", random.Random(SEED + number))
