"""Reading a run's folder: what stands there, by name; what does not is None, never a guess."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from latentforge.errors import RefusedError
from latentforge.evidence.checks import planted_run
from latentforge.evidence.reading import find_run, read_run
from latentforge.verdicts import Outcome


def test_a_recorded_run_reads_as_its_files_say(run_dir: Path) -> None:
    record = read_run(run_dir)
    assert (record.id, record.kind, record.attempt) == (run_dir.name, "distill", 1)
    assert record.requested is not None
    assert record.effective is not None
    assert (record.requested["device"], record.effective["device"]) == ("auto", "cpu")
    assert [(one.falsifier, one.outcome) for one in record.verdicts] == [("F-DISTILL-SMOKE-001", Outcome.PASS)]
    assert record.outcome is Outcome.PASS
    assert record.subjects is not None
    assert "out/student/model.safetensors" in record.subjects
    assert (record.peak_memory_bytes, record.seeds) == (1 << 28, {"torch": 7})
    assert record.host == {"hostname": "planted", "kernel": "6.1"}


def test_metrics_and_steps_are_series_by_name(run_dir: Path) -> None:
    record = read_run(run_dir)
    loss = record.metric("val_loss", model="student", split="heldout")
    assert loss is not None
    assert (loss.steps, loss.values) == ((0, 2), (4.91, 3.04))
    steps = record.steps_of("loss", model="student")
    assert steps is not None
    assert (steps.steps, steps.values) == ((1, 2), (3.0, 2.0))
    assert record.metric("val_loss", model="twin") is None
    assert [phase.name for phase in record.phases] == ["train"]
    assert record.phases[0].seconds is not None


def test_two_models_of_one_metric_are_never_taken_for_one(tmp_path: Path) -> None:
    run_dir = planted_run(tmp_path)
    lines = (run_dir / "events.jsonl").read_text().splitlines(keepends=True)
    twin = [line.replace('"student"', '"twin"') for line in lines if '"metric"' in line]
    (run_dir / "events.jsonl").write_text("".join(lines + twin))
    record = read_run(run_dir)
    assert record.metric("val_loss") is None
    assert record.metric("val_loss", model="twin") is not None


def test_what_a_folder_lacks_is_none_and_the_end_is_not_known(tmp_path: Path) -> None:
    run_dir = tmp_path / ("distill-" + "0" * 20)
    run_dir.mkdir()
    record = read_run(run_dir)
    assert (record.identity, record.requested, record.effective, record.manifest) == (None, None, None, None)
    assert (record.seeds, record.timings, record.peak_memory_bytes, record.flops) == (None, None, None, None)
    assert (record.host, record.subjects, record.attempt) == (None, None, None)
    assert record.outcome is Outcome.UNKNOWN


def test_a_torn_log_and_another_runs_events_are_told_and_not_counted(tmp_path: Path) -> None:
    run_dir = planted_run(tmp_path)
    log = run_dir / "events.jsonl"
    foreign = log.read_text().splitlines()[-2].replace(run_dir.name, "distill-" + "0" * 20)
    log.write_text(log.read_text() + foreign + "\nhalf a li\n" + '{"seq": 9')
    record = read_run(run_dir)
    assert [text.split(" ", 2)[2] for text in record.unread] == ["is no event", "is an event of distill-" + "0" * 20]
    assert len(record.verdicts) == 1


def test_numbers_that_json_has_not_are_read_back(tmp_path: Path) -> None:
    run_dir = planted_run(tmp_path)
    log = run_dir / "events.jsonl"
    log.write_text(log.read_text().replace('"value": 3.04', '"value": "nan"'))
    loss = read_run(run_dir).metric("val_loss")
    assert loss is not None
    assert math.isnan(loss.values[-1])


def test_a_file_that_is_not_what_its_name_promises_is_refused_by_name(tmp_path: Path) -> None:
    run_dir = planted_run(tmp_path)
    (run_dir / "effective.json").write_text("[1]")
    with pytest.raises(RefusedError, match=r"effective\.json is not a JSON object"):
        read_run(run_dir)
    with pytest.raises(RefusedError, match="is not a run id"):
        read_run(tmp_path)


def test_reading_changes_nothing_and_a_beginning_of_an_id_finds_the_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in run_dir.rglob("*"))
    monkeypatch.setenv("EVIDENCE_DIR", str(run_dir.parent))
    assert read_run(find_run(run_dir.name[:14])).id == run_dir.name
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in run_dir.rglob("*"))
    with pytest.raises(RefusedError, match="is the beginning of 2 runs"):
        find_run("distill-")


def test_the_record_of_what_was_understood_matches_the_manifest(run_dir: Path) -> None:
    record = read_run(run_dir)
    predicate = json.loads((run_dir / "manifest.json").read_bytes())["predicate"]
    assert record.requested == predicate["configuration"]["requested"]
    assert record.end == predicate["end"]


def test_an_event_whose_kind_or_model_is_a_list_is_read_past(tmp_path: Path) -> None:
    from latentforge.evidence.checks import planted_run

    run = planted_run(tmp_path)
    events = (run / "events.jsonl").read_text()
    broken = events.replace('"kind": "end"', '"kind": ["end"]').replace('"model": "student"', '"model": ["student"]')
    (run / "events.jsonl").write_text(broken)
    record = read_run(run)
    assert record.end["code"] is None
    assert any("is no event" in line for line in record.unread)
    assert record.steps_of("loss", model="['student']") is not None
