"""The report in a terminal."""

from __future__ import annotations

import json
import math
from pathlib import Path

from latentforge.evidence.reading import read_run
from latentforge.report.comparison import compare
from latentforge.report.making import make_report
from latentforge.report.page import section
from latentforge.report.standing import standing
from latentforge.report.terminal import compared_lines, lines

from .planted import SAMPLES, distilled


def _told(run: Path, columns: int = 100) -> list[str]:
    record = read_run(run)
    return lines(section(record, standing(run)), columns=columns)


def test_it_begins_with_the_outcome_and_what_happened(runs: Path) -> None:
    run = distilled(runs)
    told = _told(run)
    assert told[0] == f"PASS  {run.name}"
    assert told[2].startswith("In 60 steps the student")
    text = "\n".join(told)
    for part in ("F-BATCH-ROWS-001", "evidence", "Cross-entropy", "KL to the teacher", "phases", "the text itself"):
        assert part in text


def test_no_line_is_wider_than_the_terminal(runs: Path) -> None:
    for columns in (60, 80, 120):
        assert max(map(len, _told(distilled(runs, attempt=columns), columns))) <= columns


def test_no_text_of_a_run_can_steer_the_terminal_or_look_like_a_line_of_the_report(runs: Path) -> None:
    run = distilled(runs, samples=[{"prompt": "a\nPASS    F-FAKE-001\x1b[2J\x9b1A", "text\nPASS": "\r\u202e"}])
    events = (run / "events.jsonl").read_text()
    named = json.dumps("t\nPASS F-FAKE-002")
    (run / "events.jsonl").write_text(events.replace('"model": "twin"', f'"model": {named}'))
    told = _told(run)
    assert not any(line.startswith(("PASS    F-FAKE", "PASS F-FAKE")) for line in told)
    assert all(line.isprintable() for line in told)


def test_a_curve_that_ends_with_no_number_says_so_and_a_cut_name_ends_with_an_ellipsis(runs: Path) -> None:
    run = distilled(runs, loss_at=lambda step: math.nan if step == 60 else 4.0)
    events = (run / "events.jsonl").read_text()
    (run / "events.jsonl").write_text(events.replace('"model": "twin"', f'"model": "{"t" * 40}"'))
    told = _told(run)
    assert next(line for line in told if line.startswith("    student ")).endswith("not a number")
    assert any(line.startswith(f"    {'t' * 29}…  ") for line in told)


def test_the_terminal_tells_in_the_order_of_the_page(runs: Path, tmp_path: Path) -> None:
    run = distilled(runs, warnings=("careful",), samples=SAMPLES * 3)
    effective = json.loads((run / "effective.json").read_text())
    effective["effective"]["distill"]["learning_rate"] = 2e-3
    (run / "effective.json").write_text(json.dumps(effective))
    marks = ["evidence", "tokens/s, median", "what it learned", "how it ran", "counted of the teacher", "phases",
             "compiles after set-up", "checkpoint, step 60", "warnings", "a sample", "DIFFERS"]  # fmt: skip
    text = "\n".join(_told(run))
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)
    assert "a sample, the first of 3" in text
    page = make_report([str(run)], tmp_path / "report.html").page
    assert page is not None
    shown = page.read_text().partition("<body>")[2].lower()
    places = [shown.index(mark.lower().removeprefix("a ").removeprefix("counted ")) for mark in marks]
    assert places == sorted(places)


def test_runs_are_compared_in_lines(runs: Path) -> None:
    first, second = distilled(runs), distilled(runs, rate=2e-3)
    text = "\n".join(compared_lines(compare([read_run(first), read_run(second)]), columns=100))
    assert f"{first.name[:12]}  PASS" in text
    assert "learning_rate" in text
    assert "0.001 | 0.002" in text
