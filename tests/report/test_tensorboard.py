"""Event files are read back by TensorBoard's own reader."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latentforge.cli import main
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


def test_a_run_that_went_on_replaces_its_own_file(runs: Path, tmp_path: Path) -> None:
    run = distilled(runs)
    whole = (run / "events.jsonl").read_text().splitlines(keepends=True)
    later = [json.dumps(json.loads(line) | {"wall": "2999-01-01T00:00:00Z"}) + "\n" for line in whole[20:]]
    for lines in (whole[:20], [*whole[:20], *later]):
        (run / "events.jsonl").write_text("".join(lines))
        path = write_events(read_run(run), tmp_path)
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_events_without_a_step_that_tensorboard_can_hold_are_counted_in_its_text(runs: Path, tmp_path: Path) -> None:
    run = distilled(runs)
    events = (run / "events.jsonl").read_text().replace('"step": 7, ', f'"step": {2**63}, ')
    (run / "events.jsonl").write_text(events)
    read = EventAccumulator(str(write_events(read_run(run), tmp_path).parent))
    read.Reload()
    assert b"2 events are left out" in read.Tensors("report")[0].tensor_proto.string_val[0]


def test_without_tensorboard_its_files_are_refused_by_name_before_anything_is_written(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name == "tensorboard" else found(name, *of)
    )
    asked = ["--to", str(tmp_path / "report.html"), "--tensorboard", str(tmp_path / "tb")]
    assert main(["report", str(distilled(runs)), *asked]) == 2
    assert "needs the package tensorboard, which is not installed" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_no_report_imports_tensorboard_but_one_with_its_files(runs: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from latentforge.report.making import make_report\n"
        "make_report([sys.argv[1]], Path(sys.argv[2]))\n"
        "assert not {'tensorboard', 'google.protobuf', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(distilled(runs)), str(tmp_path / "report.html")], check=True)


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
