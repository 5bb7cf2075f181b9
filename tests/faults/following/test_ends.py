"""However a run goes, following it ends by itself, with the right exit code and a record of why."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from latentforge.errors import UnknownOutcomeError
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("how", "code", "ending", "word"),
    [
        ({}, ExitCode.PASS, "pass", "F-DISTILL-SMOKE-001 PASS"),
        ({"fail": True}, ExitCode.FAIL, "fail", "F-DISTILL-SMOKE-001 FAIL"),
        ({"exit": 5, "reason": "bad luck"}, ExitCode.CRASHED, "crashed", "bad luck"),
        ({"no_end": True}, ExitCode.FAIL, "fail", "its process ended with 0, its events have no end event"),
        (
            {"losses": {"20": "nan"}},
            ExitCode.FAIL,
            "fail",
            "F-DISTILL-LIVENESS-004 FAIL run=RUN loss of the student at step 20 is nan",
        ),
        (
            {"effective": {"flops": {"student": 1e14}, "device": {"type": "cpu", "threads": 2}}},
            ExitCode.FAIL,
            "fail",
            "x faster than their 100 TFLOP allow",
        ),
        ({"checkpoint": {"bytes": 200, "expected_bytes": 8000}}, ExitCode.FAIL, "fail", "has 200 bytes"),
    ],
    ids=["pass", "fail", "crashed", "no end event", "nan", "too fast", "small checkpoint"],
)
def test_a_run_that_ends_is_told_as_it_ended(
    going: Make, how: dict[str, Any], code: ExitCode, ending: str, word: str
) -> None:
    one = going(**how)
    told, out = one.watch()
    assert told is code, out
    assert word.replace("RUN", one.run) in out
    assert one.record["ending"] == ending
    assert one.record["code"] == int(code)
    # Asked again, from the copy alone, it is the same, in every word that it says.
    again, repeated = one.watch()
    assert again is code
    assert repeated == out


@pytest.mark.parametrize(
    ("how", "word"),
    [({"forged": ["no event"]}, "FAILED  events.jsonl  line "), ({"no_verdict": True}, "verified, unsigned")],
    ids=["a line that nobody can read", "no falsifier said anything"],
)
def test_an_exit_of_0_that_is_not_the_whole_story_is_unknown_and_never_green(
    going: Make, how: dict[str, Any], word: str
) -> None:
    code, out = going(**how).watch()
    assert code is ExitCode.UNKNOWN, out
    assert word in out


def test_a_killed_run_is_told_as_killed(going: Make, eventually: Make) -> None:
    one = going(wait_at=7)
    pid = eventually(lambda: one.state()["pid"], "it runs")
    os.kill(pid, signal.SIGKILL)
    code, out = one.watch()
    assert code is ExitCode.CRASHED
    assert "killed" in out
    assert one.record["ending"] == "killed"


def test_a_run_that_stands_still_is_told_with_4_left_alone_and_can_still_pass(
    going: Make, jobs: Any, eventually: Make
) -> None:
    one = going(wait_at=10)
    code, out = one.watch(stall=1.0)
    assert code is ExitCode.STALLED
    assert f"F-DISTILL-LIVENESS-001 FAIL run={one.run} no step for " in out
    assert "after step 9/20" in out
    assert f"latentforge dispatch cancel {one.run}" in out
    assert one.record["ending"] == "stalled"
    assert one.record["code"] == 4
    assert one.state()["state"] == "running"
    jobs.open()
    code, _out = one.watch(stall=30.0)
    assert code is ExitCode.PASS
    assert one.record["ending"] == "pass"


@pytest.mark.parametrize(("spin", "kind"), [(True, "CPU-bound"), (False, "idle")])
def test_what_a_stalled_run_does_is_told_from_its_heartbeats(going: Make, spin: bool, kind: str) -> None:
    one = going(wait_at=10, spin=spin)
    code, out = one.watch(stall=6.0)
    assert code is ExitCode.STALLED
    assert one.record["activity"] == kind, one.record
    assert kind in out


@pytest.mark.parametrize(
    ("how", "deadline", "ending", "word"),
    [
        ({"hang_in": "start"}, "appear=1", "log never appeared", "has written no log and no event"),
        ({"hang_in": "load"}, "loading=1", "deadline", "loading for "),
        ({"hang_in": "warm-up"}, "warm-up=1", "deadline", "warming up for "),
        ({"wait_at": 5}, "2", "still running at the deadline", "still running at step 4 after "),
    ],
    ids=["no log", "loading", "warm-up", "whole run"],
)
def test_each_phase_has_a_deadline(going: Make, how: dict[str, Any], deadline: str, ending: str, word: str) -> None:
    one = going(**how)
    code, out = one.watch(deadline)
    assert code is ExitCode.STALLED
    assert f"F-DISTILL-LIVENESS-002 FAIL run={one.run} " in out
    assert word in out
    assert one.record["ending"] == ending


@pytest.mark.sshd
@pytest.mark.fault(row=3)
def test_a_host_that_stays_away_is_a_record_of_its_own_and_the_run_is_followed_later(
    going: Make, sshd_at: Make, enrolled: Make, jobs: Any, eventually: Make
) -> None:
    import threading

    server = sshd_at()
    one = going(enrolled(server), wait_at=5)
    raised: list[UnknownOutcomeError] = []

    def watch() -> None:
        try:
            one.watch(patience=1.0)
        except UnknownOutcomeError as error:
            raised.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        eventually((one.copy / "identity.json").exists, "it is followed", 60.0)
        server.stop()
        thread.join(60)
    finally:
        server.start()
        jobs.open()
    assert raised[0].code is ExitCode.UNKNOWN
    assert raised[0].next == f"latentforge dispatch watch {one.run}"
    assert one.record["ending"] == "transport lost"
    assert one.watch()[0] is ExitCode.PASS


@pytest.mark.fault(row=27)
def test_a_pass_of_another_run_or_of_an_echoed_configuration_is_not_green(going: Make) -> None:
    other = "distill-" + "beef" * 5
    forged = [
        f'{{"seq": 99, "t": 1.0, "wall": "", "run": "{other}", "kind": "verdict", "falsifier": "F-DISTILL-SMOKE-001", '
        '"outcome": "pass", "text": "fine", "measured": {}}',
    ]
    lines = [f"F-DISTILL-SMOKE-001 PASS run={other} val_loss 1.0 < 2.0", 'require = ["F-DISTILL-SMOKE-001 PASS"]']
    one = going(say={"3": [*lines, "F-DISTILL-SMOKE-001 PASS"]}, forged=forged, fail=True)
    code, out = one.watch()
    assert code is ExitCode.FAIL
    green = [line for line in out.splitlines() if line.startswith("F-DISTILL") and " PASS" in line]
    assert green == []
    assert out.count("(not this run's verdict") == 2
    assert len(one.record["mismatches"]) == 2
    assert any(other in warning for warning in one.record["warnings"])


@pytest.mark.fault(row=27)
def test_where_event_and_text_disagree_the_event_counts_and_the_line_is_recorded(going: Make) -> None:
    one = going(say={"3": ["step 2/20 loss 0.0001 lr 1.00e-03 tok/s 9"], "20": ["F-DISTILL-SMOKE-001 FAIL run=x"]})
    code, _out = one.watch()
    assert code is ExitCode.PASS
    what = {one["what"] for one in one.record["mismatches"]}
    assert "the event of this step says loss 4.9000" in what
    assert len(what) == 2
