"""Whatever a run writes into its events, following it ends with a verdict, and never with a crash or a false one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dispatch.following.activity import Beats
from dispatch.following.checks import ACTIVITIES, RUN, Story
from dispatch.following.limits import Limits
from dispatch.following.pace import too_fast
from dispatch.following.view import RunView
from dispatch.following.watcher import EventTail, Watcher
from dispatch.hosts.facts import RunState
from latentforge.events import Event
from latentforge.verdicts import ExitCode

HUGE = 10**400
RUNNING = RunState(state="running", seconds=10.0)
PASSED = RunState(state="finished", outcome="pass", exit=0)


def line(kind: str, **fields: Any) -> str:
    head = {"seq": 1, "t": 5.0, "wall": "", "run": RUN, "kind": kind}
    return json.dumps({**head, **fields}) + "\n"


STEP = {"step": 1, "steps": 1, "model": "student", "loss": 1.0}


@pytest.mark.parametrize(
    "odd",
    [
        line("step", **{**STEP, "t": HUGE}),
        line("step", **{**STEP, "loss": HUGE}),
        "".join(line("step", **{**STEP, "step": step, "steps": HUGE}) for step in range(130)),
        line("phase", name="load", state="end", seconds=HUGE),
        line("memory", rss=HUGE),
        line("warning", message="half \ud800 of a character"),
        "{" * 5000 + "\n",
        "no event\n",
    ],
)
def test_what_no_counter_and_no_text_can_hold_is_no_event(odd: str) -> None:
    watcher, view = Watcher(RUN), RunView(RUN)
    watcher.state(RUNNING, 100.0)
    events = EventTail().feed((odd + line("end", code=0)).encode())
    for event in watcher.events(events):
        view.feed(event)
    assert watcher.overdue() is None
    record = watcher.concluded(PASSED, {}, events)
    assert record.code is ExitCode.PASS
    json.dumps(record.as_json(), ensure_ascii=False).encode()


def test_a_name_of_several_lines_cannot_make_a_red_verdict_unsayable() -> None:
    story = Story(Limits(other=30.0), run="data-" + "5eed" * 5)
    story.event("phase", name="eval\n\x1b[2Jagain", state="begin")
    record = story.wait(60)
    assert record is not None
    assert record.verdicts[0].text.startswith("eval again for 31 s")
    bad = Story()
    bad.begin()
    bad.event("step", step=1, steps=1, model="stu\nd\u202eent", loss="nan")
    assert bad.watcher.news() == [f"F-DISTILL-LIVENESS-004 FAIL run={RUN} loss of the stu dent at step 1 is nan"]


@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (False,), (0.0,)])
def test_only_an_end_of_exactly_0_is_one_and_no_later_one_takes_another_back(codes: tuple[Any, ...]) -> None:
    story = Story()
    for code in codes:
        story.event("end", code=code)
    assert story.watcher.concluded(PASSED, {}, story.told).code is ExitCode.FAIL


@pytest.mark.parametrize("ahead", [1e15, 3600.0])
@pytest.mark.parametrize("replayed", [True, False])
def test_a_step_that_is_yet_to_come_does_not_hide_a_stall(ahead: float, replayed: bool) -> None:
    story = Story(Limits(overall=None), telemetry=ACTIVITIES["idle"])
    story.begin()
    story.steps(0.1, 1, 30, 90)
    if replayed:
        story.watcher = Watcher(RUN, Limits(overall=None))
        story.watcher.events(story.told)
    story.watcher.events([Event(99, story.clock + ahead, "", RUN, "step", {**STEP, "step": 31, "steps": 90})])
    record = story.wait(7300.0, every=10.0)
    assert record is not None
    assert record.ending == "stalled"


def test_a_heartbeat_that_is_yet_to_come_is_none() -> None:
    beats = Beats()
    beats.feed({"clock": 1e12, "cpu": 1.0, "io": 0}, 100.0)
    beats.feed({"clock": 90.0, "cpu": 0.0, "io": 0, "gpu": None}, 100.0)
    beats.feed({"clock": 110.0, "cpu": 40.0, "io": 0, "gpu": None}, 110.0)
    assert beats.activity(90.0).kind == "CPU-bound"


@pytest.mark.parametrize("state", ["starting", "finishing"])
def test_a_run_that_never_gets_beyond_its_start_is_not_waited_for_without_end(state: str) -> None:
    watcher = Watcher(RUN, Limits())
    for clock in range(1000, 1000 + 140, 10):
        watcher.state(RunState(state=state), float(clock))
        record = watcher.overdue()
    assert record is not None
    assert record.ending == "log never appeared"


def test_a_run_that_waited_long_for_its_turn_has_all_the_time_to_start() -> None:
    watcher = Watcher(RUN, Limits())
    watcher.state(RunState(state="queued"), 1000.0)
    for clock in (9000.0, 9010.0):
        watcher.state(RunState(state="starting"), clock)
        assert watcher.overdue() is None


@pytest.mark.parametrize("flops", [float("nan"), float("inf"), HUGE, -1e30, True])
def test_operations_that_are_no_number_judge_no_pace(flops: Any) -> None:
    events = [Event(0, 1.0, "", RUN, "step", STEP), Event(1, 1.1, "", RUN, "step", STEP)]
    assert too_fast(events, {"flops": {"student": flops}, "device": {"type": "cpu", "threads": HUGE}}) is None
