"""Targets are fetched ahead of their step, in its order, and nothing else about the run changes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from latentforge.events import read_events
from latentforge.memory.estimate import ahead_bytes
from latentforge.spec.run import RunDir
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.fixture import FixtureTeacher
from latentforge.teachers.http.client import HttpClient
from latentforge.teachers.prefetch import Interrupted, Prefetcher
from latentforge.train import effective
from latentforge.train.engines.world import World
from latentforge.train.feed import Feed
from latentforge.train.onpolicy import OnPolicy
from latentforge.train.rehearsal import small_batch, small_trainer
from latentforge.train.supply import Supply
from latentforge.train.supply_checks import Elsewhere, supply_of
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


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_interrupt_does_not_wait_for_a_server_that_is_silent(ahead: int) -> None:
    """A real client in the middle of a request with a time-out of ten minutes, and a run that is told to stop."""
    told = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = HttpClient(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", timeout=600.0)
        failures: list[TeacherFailure] = []

        def fetch(step: int) -> Any:
            try:
                return client.post("/completions", {})
            except TeacherFailure as failure:
                failures.append(failure)
                raise

        def serve() -> None:
            connection, _ = silent.accept()
            with connection:
                assert connection.recv(1 << 16)
                told.set()
                while connection.recv(1 << 16):
                    pass

        server = threading.Thread(target=serve)
        server.start()
        feed = Prefetcher(fetch, range(3), ahead=ahead, cancel=client.close, interrupted=told.is_set)
        with feed, pytest.raises(Interrupted):
            feed.take(0)
        server.join(DEADLINE)
    assert [failure.kind for failure in failures] == ["cut"]
    assert threads() == []


def test_an_interrupt_does_not_wait_for_who_judges_the_students_text() -> None:
    told, closed = threading.Event(), threading.Event()

    class Silent(Elsewhere):
        def score(self, sequences: Any, *, k: int, temperatures: tuple[float, ...]) -> Any:
            told.set()
            assert closed.wait(DEADLINE)
            raise TeacherFailure("cut", "closed")
            yield

        def close(self) -> None:
            closed.set()

    own = OnPolicy(1.0, 4, 1.0, 7)
    asked: dict[str, Any] = {"supply": supply_of(Silent()), "ahead": 2, "on_policy": own}
    feed = Feed(small_batch, range(1), interrupted=told.is_set, **asked)
    with feed, pytest.raises(Interrupted):
        feed.next(0, small_trainer(ce_weight=0.3, kd_weight=0.7).student)
    assert closed.is_set()
    assert threads() == []


def test_a_process_of_several_that_is_told_to_stop_still_takes_the_targets_that_it_waits_for() -> None:
    asked: dict[str, Any] = {"supply": supply_of(Elsewhere(delay=0.2)), "ahead": 2, "interrupted": lambda: True}
    student = small_trainer().student
    with Feed(small_batch, range(1), world=World(1, 2, 2), **asked) as feed:
        assert [len(lesson.tokens) for lesson in feed.next(0, student).lessons or ()] == [8]
    with Feed(small_batch, range(1), **asked) as feed, pytest.raises(Interrupted):
        feed.next(0, student)


def test_dense_targets_are_not_piled_up_ahead_of_their_steps() -> None:
    """Two batches of 16 x 127 rows of 152000 logits are 2.5 GB, held for nothing but to be early."""
    assert ahead_bytes(2, 16, 128, 152_000) == 0
    assert ahead_bytes(2, 16, 128, 32_000) == 2 * 16 * 127 * 32_000 * 4
    supply = Supply(FixtureTeacher(64), temperature=1.0, k=None, width=64, on_loss="stop", ce_alone=1.0)
    for fits in (True, False):
        with Feed(small_batch, range(2), supply=supply, ahead=2, dense_fits=fits) as feed:
            assert (feed.asked_ahead, feed.ahead) == (2, 2 if fits else 0)
            lessons = list(feed.next(0, small_trainer().student).lessons or ())
            assert [len(lesson.tokens) for lesson in lessons] == [16]


@pytest.mark.parametrize(
    ("asked", "held", "said"),
    [
        ({"prefetch": 3}, ("asked_ahead", 0), "prefetch = 3 asked, 0 in force"),
        ({"on_teacher_loss": "degrade"}, ("on_loss", "stop"), "on_teacher_loss = 'degrade' asked, 'stop' in force"),
        ({"on_policy": 0.5, "on_policy_tokens": 8}, ("share", 0.0), "on_policy = 0.5 asked, 0.0 in force"),
    ],
)
def test_a_teaching_that_drops_what_was_asked_is_stopped_before_step_1(
    make_run: MakeRun,
    run_here: RunHere,
    monkeypatch: pytest.MonkeyPatch,
    asked: dict[str, Any],
    held: tuple[str, Any],
    said: str,
) -> None:
    """The values in force are read from feed, supply and policy: one that holds another is seen."""
    name, value = held
    kind = {"asked_ahead": Feed, "on_loss": Supply, "share": OnPolicy}[name]
    original = kind.__init__

    def deaf(self: Any, *words: Any, **named: Any) -> None:
        original(self, *words, **named)
        object.__setattr__(self, name, value)

    monkeypatch.setattr(kind, "__init__", deaf)
    run = make_run(targets="live", **asked)
    code, text = run_here(run)
    assert code == 1
    assert said in text
    assert not any(e.kind == "step" for e in read_events(run.events_file))
