"""A whole pipeline in this process: run folders made and executed one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch

from latentforge.errors import FailedError
from latentforge.evidence.digests import file_sha256, tree_files, tree_sha256
from latentforge.spec.code import running_code
from latentforge.spec.endurance import TRAINING, carriage_of
from latentforge.spec.identity import Kind
from latentforge.spec.pipeline import PlannedRun, Role, effective_pipeline, external_paths, pipeline_runs
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.spec.sections import PipelineSpec
from latentforge.spec.teacher import ASKING, reach_of
from latentforge.train.run import execute
from latentforge.verdicts import ExitCode

LOCK = "cpu"


def plan(spec: PipelineSpec, *, through: Kind | None = None) -> list[PlannedRun]:
    """The runs of a pipeline for the code of this process, its external paths hashed now."""
    digests = {external.path: tree_sha256(Path(external.path)) for external in external_paths(spec)}
    code = running_code()
    wanted, _notes = effective_pipeline(spec)
    return pipeline_runs(wanted, digests=digests, code=code.digest, lock=code.lock_sha256(LOCK), through=through)


def execute_pipeline(
    spec: PipelineSpec,
    root: Path,
    *,
    through: Kind | None = None,
    text: TextIO | None = None,
    accept: Callable[[Kind, ExitCode], bool] = lambda kind, code: code in (ExitCode.PASS, ExitCode.FAIL),
) -> dict[Role, RunDir]:
    """Run a pipeline below ``root``/runs; runs that passed there before are kept.

    Returns the folders by role. FailedError where a run ends with a code that ``accept`` does not take: by default
    only the last run may fail a falsifier, since what builds on a failed run is refused anyway.
    """
    runs = root / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    folders: dict[Role, RunDir] = {}
    for planned in plan(spec, through=through):
        folder = RunDir(runs / planned.run_id)
        if not folder.artifacts_file.is_file():
            if folder.events_file.is_file():
                raise FailedError(f"{planned.run_id} was run here before and is not whole: {_reason(folder)}")
            reach = reach_of(spec.teacher) if planned.kind in ASKING else {}
            lasting = carriage_of(spec.endurance) if planned.kind in TRAINING else {}
            launch = LaunchRecord(planned.run_id, planned.kin, planned.resolved, reach=reach, endurance=lasting)
            folder = RunDir.create(runs, planned.identity, launch)
            with _torch_settings_kept():
                code = execute(folder.path, text=text)
            if not accept(planned.kind, code):
                raise FailedError(f"{planned.run_id} ended with {code.name.lower()}: {_reason(folder)}", code=code)
            record_artifacts(folder)
        folders[planned.role] = folder
    return folders


@contextmanager
def _torch_settings_kept() -> Iterator[None]:
    """A run fixes threads, determinism and seeds for its process; here the process is somebody else's."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def record_artifacts(run: RunDir) -> None:
    """Write ``artifacts.json`` as a host's supervisor does, so that a run that builds on this one checks its files."""
    files = [
        {"path": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for name, path in tree_files(run.path)
        if not name.startswith("out/checkpoints/")
    ]
    run.artifacts_file.write_text(json.dumps({"files": files}, indent=1))


def _reason(run: RunDir) -> str:
    from latentforge.events import read_events

    events = read_events(run.events_file)
    return str(events[-1].fields.get("reason", "")) if events else "no events"
