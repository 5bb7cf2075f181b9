"""Reports of runs that were really made: each stage of a tiny pipeline, in a browser."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from latentforge.evidence.reading import read_run
from latentforge.report.making import make_report
from latentforge.report.page import section
from latentforge.report.standing import standing
from latentforge.report.terminal import lines
from latentforge.report.words import size
from latentforge.train.inprocess import execute_pipeline
from latentforge.train.rehearsal import tiny_spec

from .chromium import Chromium


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of a short pipeline by kind: data, teacher, score, distill."""
    spec = tiny_spec(steps=24, checkpoint_every=12, warmup_steps=2, require=("F-DISTILL-SMOKE-001",))
    small = {
        "teacher": spec.teacher.model_copy(update={"steps": 30}),
        "data": spec.data.model_copy(update={"train_sequences": 96, "heldout_sequences": 16}),
    }
    root = tmp_path_factory.mktemp("real")
    made = execute_pipeline(spec.model_copy(update=small), root, text=io.StringIO())
    return {run.kind: run.path for run in made.values()}


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", ["data", "teacher", "score", "distill"])
def test_the_report_of_each_stage_fits_and_is_quiet(
    browser: Chromium, pipeline: dict[str, Path], tmp_path: Path, kind: str, width: int
) -> None:
    page = make_report([str(pipeline[kind])], tmp_path / "report.html").page
    assert page is not None
    seen = browser.show(page, width=width)
    assert (seen.overflow, seen.console, seen.asked) == ([], [], [])


def test_the_report_of_a_real_distillation_shows_what_its_trainer_stated(
    pipeline: dict[str, Path], tmp_path: Path
) -> None:
    make_report([str(pipeline["distill"]), str(pipeline["teacher"])], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for part in ("F-EFFECTIVE-LR-001", "KL to the teacher", "learning_rate", "the text itself", "teacher coverage"):
        assert part in page
    held = read_run(pipeline["distill"]).events
    told = next(event.fields for event in reversed(held) if "measured_bytes" in event.fields)
    share = round(100 * told["measured_bytes"] / told["planned_bytes"])
    assert f"{share} % of {size(told['planned_bytes'])} planned; {size(told['resident_bytes'])} resident" in page
    assert "In 24 steps the student of" in page
    assert "lowered its held-out loss from" in page
    record = read_run(pipeline["distill"])
    told = lines(section(record, standing(record.folder)), columns=80)
    assert max(map(len, told)) <= 80
