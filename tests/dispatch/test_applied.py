"""What changed since the last plan was applied is said with its cause; nothing changed is said as that."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from dispatch.planning.applied import compare
from dispatch.session import preview
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]


def kept(**changes: Any) -> dict[str, Any]:
    """A kept plan."""
    steps = [
        {"name": "preflight", "will": "check", "run": None, "because": "3 pass"},
        {"name": "build", "will": "run", "run": "build-1", "because": "no build for this code"},
        {"name": "distill", "will": "run", "run": "distill-1", "because": "distill-1  not there yet"},
    ]
    base = {
        "plan": "a" * 64,
        "at": "2026-11-09T10:00:00+00:00",
        "code": "c1",
        "code_label": "1c9fe2a",
        "lock": "l" * 64,
    }
    return {**base, "lock_name": "cpu", "spec": {"distill.steps": 60, "teacher.model": None}, "steps": steps, **changes}


def steps(*changed: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps with some of them replaced by name."""
    by_name = {step["name"]: step for step in [*kept()["steps"], *changed]}
    return list(by_name.values())


DONE = {"will": "keep", "because": "passed"}


def test_nothing_changed_is_said() -> None:
    assert compare(kept(), kept()).lines() == [
        "  since plan aaaaaaaa, applied 2026-11-09 10:00 UTC: no judgement has changed"
    ]


def test_what_was_to_be_done_and_is_there_now_is_done() -> None:
    now = steps({"name": "build", "run": "build-1", **DONE}, {"name": "distill", "run": "distill-1", **DONE})
    assert compare(kept(), kept(steps=now)).lines() == [
        "  since plan aaaaaaaa, applied 2026-11-09 10:00 UTC: done: build, distill"
    ]


@pytest.mark.parametrize(
    ("now", "line"),
    [
        ({"spec": {"distill.steps": 61, "teacher.model": None}}, "distill.steps  60 → 61"),
        ({"spec": {"distill.steps": 60, "teacher.model": "/m"}}, 'teacher.model  nothing → "/m"'),
        ({"code": "c2", "code_label": "1c9fe2a + 14 changed lines"}, "code  1c9fe2a → 1c9fe2a + 14 changed lines"),
        ({"lock": "m" * 64, "lock_name": "gb10"}, "lock file  cpu llllllllllll → gb10 mmmmmmmmmmmm"),
        (
            {"steps": steps({"name": "distill", "will": "run", "run": "distill-2", "because": "distill-2  not there"})},
            "distill  distill-1 → distill-2: run  (not there)",
        ),
        (
            {"steps": steps({"name": "distill", "will": "ended", "run": "distill-1", "because": "distill-1  fail"})},
            "distill  run → ended  (fail)",
        ),
        (
            {"steps": steps({"name": "preflight", "will": "refuse", "run": None, "because": "disk: too little"})},
            "preflight  check → refuse  (disk: too little)",
        ),
        (
            {"steps": steps({"name": "canary", "will": "run", "run": "distill-9", "because": "distill-9  not there"})},
            "canary  new: run  (not there)",
        ),
        ({"steps": kept()["steps"][:2]}, "distill  not needed any more"),
    ],
)
def test_every_change_is_a_line_with_its_cause(now: dict[str, Any], line: str) -> None:
    assert f"    {line}" in compare(kept(), kept(**now)).lines()


def test_a_plan_shows_what_changed_since_the_last_one_was_applied_and_previews_leave_that_alone(
    jobs: Any, ask: Make, session: Make, laptop: Any, snapshot: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preview(ask(), laptop.places, as_json=False) is ExitCode.PASS
    assert "since plan" not in capsys.readouterr().out
    assert session().go(ask()) is ExitCode.PASS
    assert "since plan" not in capsys.readouterr().out
    before, shown = snapshot(laptop.home), []
    for _ in range(2):
        preview(ask(None, "distill.steps=61"), laptop.places, as_json=False)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "\n    distill.steps  60 → 61\n    distill  distill-" in shown[0]
    assert "    done: data, teacher, score\n" in shown[0]
    assert snapshot(laptop.home) == before
    assert session().go(ask()) is ExitCode.PASS
    out = capsys.readouterr().out
    assert ": done: data, teacher, score, distill, follow, collect, evidence\n" in out
    assert snapshot(laptop.home) == before  # it had nothing to apply: the first plan is still the last one applied
    preview(ask(None, "seed=8"), laptop.places, as_json=True)
    since = json.loads(capsys.readouterr().out)["since"]
    assert "seed  7 → 8" in since["changes"]


def test_a_kept_plan_that_cannot_be_read_is_as_none(ask: Make, jobs: Any, session: Make, laptop: Any) -> None:
    assert session().go(ask()) is ExitCode.PASS
    (file,) = laptop.places.plans("local").iterdir()
    file.write_text('{"schema": 1, "plan": ')
    assert session().go(ask(None, "distill.steps=61")) is ExitCode.PASS
    assert json.loads(file.read_text())["schema"] == 1
