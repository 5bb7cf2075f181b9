"""Event files are read back by TensorBoard's own reader."""

from __future__ import annotations

import math
from datetime import datetime
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latentforge.evidence.reading import read_run
from latentforge.report.tensorboard import write_events

from .planted import distilled


def test_tensorboard_reads_every_number_of_a_run_with_its_step_and_time(runs: Path, tmp_path: Path) -> None:
    record = read_run(distilled(runs))
    path = write_events(record, tmp_path)
    read = EventAccumulator(str(path.parent), size_guidance={"scalars": 0})
    read.Reload()
    for series in record.trained:
        told = read.Scalars(f"{series.model}/{series.name}")
        assert [one.step for one in told] == list(series.steps)
        assert all(math.isclose(one.value, value, rel_tol=1e-6) for one, value in zip(told, series.values, strict=True))
    held = read.Scalars("heldout/student/val_loss")
    assert [(one.step, round(one.value, 4)) for one in held] == [(0, 7.6), (60, 5.6)]
    first = next(event for event in record.events if event.kind == "metric")
    assert math.isclose(held[0].wall_time, datetime.fromisoformat(first.wall).timestamp())
    said = read.Tensors("report/text_summary" if "report/text_summary" in read.Tags()["tensors"] else "report")
    assert b"All 2 checks pass." in said[0].tensor_proto.string_val[0]


def test_writing_again_replaces_the_file_and_nan_stays_nan(runs: Path, tmp_path: Path) -> None:
    record = read_run(distilled(runs, loss_at=lambda step: math.nan if step == 3 else 1e300))
    first = write_events(record, tmp_path)
    content = first.read_bytes()
    assert write_events(record, tmp_path) == first
    assert first.read_bytes() == content
    assert [one.name for one in first.parent.iterdir()] == [first.name]
    read = EventAccumulator(str(first.parent), size_guidance={"scalars": 0})
    read.Reload()
    values = [one.value for one in read.Scalars("student/ce")]
    assert math.isnan(values[2])
    assert values[0] == math.inf


def test_a_flipped_byte_is_caught_by_the_checksum(runs: Path, tmp_path: Path) -> None:
    path = write_events(read_run(distilled(runs)), tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    read = EventAccumulator(str(path.parent), size_guidance={"scalars": 0})
    read.Reload()
    counted = sum(len(read.Scalars(tag)) for tag in read.Tags()["scalars"])
    whole = sum(len(series.steps) for series in read_run(next(runs.iterdir())).trained)
    assert counted < whole
