"""The report in a terminal."""

from __future__ import annotations

import json
from pathlib import Path

from latentforge.evidence.reading import read_run
from latentforge.report.comparison import compare
from latentforge.report.page import section
from latentforge.report.standing import standing
from latentforge.report.terminal import compared_lines, lines

from .planted import distilled


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


def test_runs_are_compared_in_lines(runs: Path) -> None:
    first, second = distilled(runs), distilled(runs, rate=2e-3)
    text = "\n".join(compared_lines(compare([read_run(first), read_run(second)]), columns=100))
    assert f"{first.name[:12]}  PASS" in text
    assert "learning_rate" in text
    assert "0.001 | 0.002" in text
