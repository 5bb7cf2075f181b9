"""Whatever a run's files say, a report of it is made, and is made of what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from latentforge.events import EventLog
from latentforge.evidence.reading import read_run
from latentforge.report.comparison import compare
from latentforge.report.page import Section, page, section
from latentforge.report.standing import Standing
from latentforge.report.tensorboard import write_events
from latentforge.report.terminal import compared_lines
from latentforge.report.terminal import lines as lines_of
from latentforge.spec.identity import RunIdentity
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.verdicts import ExitCode

from .planted import distilled

WRONG = [None, True, "x", "nan", -1, 0, 1e308, 2**70, [], [1], {"a": 1}, "\u202e<b>"]
_LONG = re.compile(r"(?<![0-9a-f])\d{25,}(?![0-9a-f])")


def _read(run: Path) -> Section:
    return section(read_run(run), Standing("unknown", "not looked at"))


def _reported(run: Path, beside: Section, to: Path) -> str:
    """Everything that is made of a run, and of it beside a sound one, which was read once and has no part of its own on
    the page; that page is returned."""
    sections = [_read(run), beside]
    records = [one.record for one in sections]
    compared = compare(records)
    assert all(line.isprintable() for line in compared_lines(compared, columns=80))
    assert all(line.isprintable() for line in lines_of(sections[0], columns=80))
    write_events(records[0], to)
    text = page(sections[:1], compared, made="now")
    assert not re.search(r'(d|style)="[^"]*(nan|inf)', text)
    assert not _LONG.search(text), "a number that nobody can read"
    return text


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_a_field_of_an_event_that_says_something_else_does_not_break_a_report(
    runs: Path, tmp_path: Path, wrong: object
) -> None:
    run = distilled(runs, steps=3, warnings=("w",), reason="r")
    beside = _read(distilled(runs, steps=3, rate=2e-3))
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    lines.insert(-1, lines[-2] | {"kind": "compile", "compiler": "c", "count": 2, "what": ["a"], "step": 2})
    for kind in {line["kind"] for line in lines}:
        of_kind = [place for place, line in enumerate(lines) if line["kind"] == kind]
        for name in {name for place in of_kind for name in lines[place]} - {"seq", "run", "kind"}:
            changed = [
                line | {name: wrong} if place in of_kind and name in line else line for place, line in enumerate(lines)
            ]
            (run / "events.jsonl").write_text("\n".join(map(json.dumps, changed)) + "\n")
            assert run.name in _reported(run, beside, tmp_path), (kind, name)


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_a_record_that_says_something_else_does_not_break_a_report(runs: Path, tmp_path: Path, wrong: object) -> None:
    run, beside = distilled(runs, steps=3), _read(distilled(runs, steps=3, rate=2e-3))
    for file in ("effective.json", "exit.json"):
        whole = (run / file).read_text()
        for name in json.loads(whole):
            (run / file).write_text(json.dumps(json.loads(whole) | {name: wrong}))
            assert run.name in _reported(run, beside, tmp_path), (file, name)
        (run / file).write_text(whole)


def _bench(runs: Path) -> Path:
    identity = RunIdentity("bench", {"seed": 7, "bench": {}}, {}, "a" * 64, "b" * 64)
    run = RunDir.create(runs, identity, LaunchRecord(identity.run_id, "c" * 64, {}))
    with open(run.log_file, "w") as text, EventLog(run.events_file, run.run, text=text) as log:
        log.metric("tokens_per_second", 700.0, step=0, split="bench", model="a")
        log.end(ExitCode.PASS)
    run.out.mkdir()
    return run.path


def _score(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


CONTESTANT = {
    "name": "a",
    "role": "token",
    "tokens_per_second": {"median": 700.0, "least": 690.0, "greatest": 710.0},
    "flops_per_token": 1.2e6,
    "quality": {"bits_per_byte": _score(2.9), "brier_lm": _score(0.4)},
}


def _changed(value: Any, wrong: object) -> list[Any]:
    """The value with ``wrong`` in each of its places, one after another."""
    if not isinstance(value, dict):
        return [wrong]
    return [wrong, *(value | {name: one} for name in value for one in _changed(value[name], wrong))]


@pytest.mark.parametrize("wrong", [*WRONG, float("nan"), float("inf"), -1e308, 10**400], ids=lambda one: repr(one)[:12])
def test_a_bench_of_another_shape_is_named_or_shown_and_draws_nothing_that_is_no_number(
    runs: Path, tmp_path: Path, wrong: object
) -> None:
    run, beside = _bench(runs), _read(distilled(runs, steps=3))
    for changed in [*_changed(CONTESTANT, wrong)]:
        (run / "out" / "bench.json").write_text(json.dumps({"contestants": [CONTESTANT, changed]}))
        text = _reported(run, beside, tmp_path)
        assert "How fast it writes" in text or "out/bench.json is no bench&#39;s report" in text


def test_every_contestant_of_a_bench_has_the_colour_of_its_bar_in_the_pictures(runs: Path) -> None:
    run = _bench(runs)
    others = [
        CONTESTANT | {"name": f"c{place}", "role": "transformers" if place == 0 else "token"} for place in range(8)
    ]
    (run / "out" / "bench.json").write_text(json.dumps({"contestants": others}))
    text = page([section(read_run(run), Standing("unknown", "-"))], None, made="now")
    bars = re.findall(r'<span>(c\d)</span><div><i class="(run\d)"', text)
    keys = re.findall(r'<i class="dot (run\d)"></i>(c\d)', text)
    assert len(bars) == 8
    assert {(name, colour) for colour, name in keys} == set(bars[1:])
    style = text.partition("</style>")[0]
    assert "background" not in re.search(r"\.bar i \{[^}]*\}", style).group()  # type: ignore[union-attr]
