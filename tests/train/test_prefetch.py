"""Targets are fetched ahead of their step, in its order, and nothing else about the run changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from latentforge.events import read_events
from latentforge.spec.run import RunDir
from latentforge.teachers.prefetch import Prefetcher
from latentforge.train import effective
from latentforge.verdicts import ExitCode

MakeRun = Callable[..., RunDir]
RunHere = Callable[[RunDir], tuple[ExitCode, str]]
DEADLINE = 60


def threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "latentforge-prefetch"]


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_every_step_gets_its_own_in_order_whatever_is_fetched_ahead(ahead: int) -> None:
    asked: list[int] = []
    with Prefetcher(lambda step: asked.append(step) or step * 10, range(3, 11), ahead=ahead) as feed:
        assert [feed.take(step).value for step in range(3, 11)] == [step * 10 for step in range(3, 11)]
    assert asked == list(range(3, 11))
    assert threads() == []


def test_no_more_is_fetched_ahead_than_was_asked() -> None:
    asked: list[int] = []
    moved = threading.Condition()

    def fetch(step: int) -> int:
        with moved:
            asked.append(step)
            moved.notify_all()
        return step

    def reached(count: int) -> bool:
        with moved:
            return moved.wait_for(lambda: len(asked) >= count, DEADLINE)

    with Prefetcher(fetch, range(100), ahead=2) as feed:
        for step in range(5):
            # While this step is waited for, it and the next one may be under way; never a third.
            assert reached(step + 2)
            assert len(asked) == step + 2
            feed.take(step)
    assert len(asked) <= 7


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_of_the_teacher_surfaces_at_the_step_that_needed_the_batch(ahead: int) -> None:
    asked: list[int] = []

    def fetch(step: int) -> int:
        asked.append(step)
        if step == 3:
            raise ConnectionResetError("the teacher is gone")
        return step

    with Prefetcher(fetch, range(10), ahead=ahead) as feed:
        assert [feed.take(step).value for step in range(3)] == [0, 1, 2]
        with pytest.raises(ConnectionResetError, match="the teacher is gone"):
            feed.take(3)
    assert asked == [0, 1, 2, 3]
    assert threads() == []


def test_an_interrupt_gives_up_what_is_being_asked_and_leaves_no_thread() -> None:
    begun, given_up = threading.Event(), threading.Event()

    def fetch(step: int) -> int:
        begun.set()
        assert given_up.wait(DEADLINE)
        raise ConnectionAbortedError("closed")

    def interrupted() -> None:
        with Prefetcher(fetch, range(10), ahead=2, cancel=given_up.set):
            assert begun.wait(DEADLINE)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert threads() == []


def test_a_step_out_of_turn_is_refused() -> None:
    with Prefetcher(lambda step: step, range(5), ahead=2) as feed:
        feed.take(0)
        with pytest.raises(ValueError, match="step 2 is taken where 1"):
            feed.take(2)
    with pytest.raises(ValueError, match="-1 ahead"):
        Prefetcher(lambda step: step, range(5), ahead=-1)


def story(run: RunDir) -> list[tuple[Any, ...]]:
    """Losses, batches and held-out values of a run, bit for bit."""
    events = read_events(run.events_file)
    steps = [e.fields for e in events if e.kind == "step"]
    metrics = [e.fields for e in events if e.kind == "metric" and e.fields["split"] == "heldout"]
    found: list[tuple[Any, ...]] = [(s["step"], s["loss"], s["batch_sha256"]) for s in steps]
    return found + [(m["name"], m["step"], m["value"]) for m in metrics]


@pytest.mark.parametrize("targets", ["store", "live"])
def test_a_run_has_the_same_losses_whether_targets_are_fetched_ahead_or_not(
    make_run: MakeRun, run_here: RunHere, targets: str
) -> None:
    runs = [make_run(steps=8, micro_batch_size=5, targets=targets, prefetch=ahead) for ahead in (0, 2)]
    for run, ahead in zip(runs, (0, 2), strict=True):
        code, text = run_here(run)
        assert code in (0, 1), text
        said = effective.read(run)["effective"]
        assert (said["distill"]["prefetch"], said["targets_fetched_ahead"]) == (ahead, ahead)
        step = next(e.fields for e in read_events(run.events_file) if e.kind == "step")
        assert step["target_seconds"] >= step["target_wait_seconds"] - 1e-6 or ahead
        assert step["kd_rows"] == step["target_rows"] == step["rows"]
        assert "KD coverage 100.0 % (3968 of 3968 rows had targets)" in text
    assert story(runs[0]) == story(runs[1])
    assert threads() == []
