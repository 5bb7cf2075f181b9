"""Flow control: nobody asks before the server allows it, nor more than was granted; what was answered is given."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.http.flow import Budget, FlowControl


class Clock:
    """Time that passes when someone sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def failing(kind: Any, retry_after: float | None = None) -> TeacherFailure:
    failure = TeacherFailure(kind, "no")
    failure.retry_after = retry_after
    return failure


def flow_with(clock: Clock, **changed: Any) -> FlowControl:
    return FlowControl(**{"clock": clock, "sleep": clock.sleep, "jitter": lambda: 1.0, **changed})


def scripted(clock: Clock, *script: TeacherFailure | None) -> tuple[Callable[[int], int], list[tuple[float, int]]]:
    """A server that fails by the script and then answers; and when it was asked, for how many entries."""
    left, asked = list(script), []

    def ask(k: int) -> int:
        asked.append((clock.now, k))
        if left and (failure := left.pop(0)) is not None:
            raise failure
        return k

    return ask, asked


@pytest.mark.parametrize("wait", [2.0, 0.5, 47.0])
def test_retry_after_is_obeyed_before_the_next_request_of_anyone(wait: float) -> None:
    clock = Clock()
    flow = flow_with(clock, jitter=lambda: 0.0)
    ask, asked = scripted(clock, failing("rate-limited", wait))
    flow.call(ask, tokens=1)
    assert asked[1][0] - asked[0][0] >= wait

    other = Clock()
    flow = flow_with(other, attempts=1)
    ask, asked = scripted(other, failing("rate-limited", wait))
    with pytest.raises(TeacherFailure):
        flow.call(ask, tokens=1)
    flow.attempts = 2
    ask, _ = scripted(other, failing("rate-limited", wait), None)
    flow.call(ask, tokens=1)
    second, again = scripted(other)
    flow.call(second, tokens=1)
    assert again[0][0] >= wait, "another request waits too"


@pytest.mark.parametrize("retry_after", [None, 0.0])
def test_waits_double_to_their_bound_with_jitter(retry_after: float | None) -> None:
    clock = Clock()
    ask, asked = scripted(clock, *[failing("server-error", retry_after) for _ in range(8)])
    flow_with(clock, attempts=9).call(ask, tokens=1)
    assert [b[0] - a[0] for a, b in pairwise(asked)] == [1, 2, 4, 8, 16, 32, 32, 32]
    low = Clock()
    ask, asked = scripted(low, *[failing("cut") for _ in range(3)])
    flow_with(low, jitter=lambda: 0.0).call(ask, tokens=1)
    assert [b[0] - a[0] for a, b in pairwise(asked)] == [0.5, 1, 2]


def test_a_wait_beyond_all_patience_is_a_failure_at_once() -> None:
    clock = Clock()
    ask, asked = scripted(clock, failing("rate-limited", 3600.0))
    with pytest.raises(TeacherFailure):
        flow_with(clock).call(ask, tokens=1)
    assert len(asked) == 1
    assert clock.now == 0.0


@pytest.mark.parametrize("kind", ["unauthorized", "model-not-found", "shifted", "too-few", "no-logprobs", "tls"])
def test_what_will_not_pass_is_not_tried_again(kind: str) -> None:
    clock = Clock()
    ask, asked = scripted(clock, failing(kind))
    with pytest.raises(TeacherFailure):
        flow_with(clock).call(ask, tokens=1)
    assert len(asked) == 1


def test_after_a_rate_limit_fewer_entries_are_asked_until_ten_answers_came() -> None:
    clock = Clock()
    flow = flow_with(clock)
    ask, asked = scripted(clock, None, failing("rate-limited", 1.0))
    for _ in range(14):
        flow.call(ask, tokens=1)
    assert [k for _, k in asked] == [20, 20, *[10] * 10, 20, 20, 20]
    assert list(flow.notes) == [
        "rate limited: asks for 10 entries a position instead of 20",
        "rate limit over: asks for 20 entries a position again",
    ]
    assert flow.metrics()["rate_limit_events"] == 1


def test_a_second_rate_limit_counts_its_ten_answers_anew() -> None:
    clock = Clock()
    flow = flow_with(clock)
    ask, asked = scripted(clock, failing("rate-limited"), *[None] * 9, failing("rate-limited"))
    for _ in range(20):
        flow.call(ask, tokens=1)
    assert [k for _, k in asked] == [20, *[10] * 20, 20]


def test_a_teacher_that_is_asked_for_few_entries_anyway_keeps_them() -> None:
    clock = Clock()
    flow = flow_with(clock, k=8)
    ask, asked = scripted(clock, failing("rate-limited"))
    flow.call(ask, tokens=1)
    assert [k for _, k in asked] == [8, 8]
    assert not flow.notes


@given(
    requests=st.none() | st.integers(0, 12),
    tokens=st.none() | st.integers(0, 60),
    script=st.lists(st.sampled_from(["ok", "rate-limited", "server-error", "cut"]), max_size=20),
)
@settings(max_examples=60)
def test_a_budget_is_never_exceeded(requests: int | None, tokens: int | None, script: list[str]) -> None:
    clock = Clock()
    flow = flow_with(clock, budget=Budget(requests, tokens))
    ask, asked = scripted(clock, *[None if kind == "ok" else failing(kind) for kind in script])
    charged = 0
    for _ in range(len(script) + 15):
        try:
            flow.call(ask, tokens=5)
        except TeacherFailure as failure:
            if failure.kind == "budget":
                break
            continue
        charged += 5
    assert requests is None or len(asked) <= requests
    assert tokens is None or charged <= tokens
    assert flow.metrics()["requests"] == len(asked)
    if requests is None and tokens is None:
        assert charged > 0, "the control: without a budget nothing is refused"


def test_what_was_refused_unread_is_not_charged() -> None:
    clock = Clock()
    flow = flow_with(clock, budget=Budget(tokens=10))
    ask, asked = scripted(clock, failing("rate-limited"), failing("connection"))
    flow.call(ask, tokens=10)
    assert len(asked) == 3
    with pytest.raises(TeacherFailure, match="10 of at most 10 tokens are spent and the next request needs 10"):
        flow.call(ask, tokens=10)


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_never_more_requests_are_open_than_was_said_and_they_are_used(concurrency: int) -> None:
    flow = FlowControl(concurrency)
    gate, lock = threading.Barrier(concurrency), threading.Lock()
    open_now = most = 0

    def ask(k: int) -> int:
        nonlocal open_now, most
        with lock:
            open_now += 1
            most = max(most, open_now)
        gate.wait(30)  # goes on only when as many as allowed are open
        with lock:
            open_now -= 1
        return k

    count = 5 * concurrency
    assert sorted(n for n, _ in flow.each([ask] * count, tokens=[1] * count)) == list(range(count))
    assert most == concurrency


def test_a_failure_ends_the_asking_and_what_was_in_flight_is_given() -> None:
    flow = FlowControl(4, attempts=1)
    all_open, failed = threading.Barrier(4), threading.Event()
    asked: list[int] = []

    def question(number: int) -> Callable[[int], int]:
        def ask(k: int) -> int:
            asked.append(number)
            all_open.wait(30)
            if number == 2:
                failed.set()
                raise failing("server-error")
            failed.wait(30)
            return number

        return ask

    given: list[int] = []
    with pytest.raises(TeacherFailure, match="server-error"):
        given.extend(number for number, _ in flow.each([question(n) for n in range(50)], tokens=[1] * 50))
    assert set(given) >= {0, 1, 3}
    assert sorted(given) == sorted(set(asked) - {2}), "every answer that was paid for is given"
    assert len(asked) < 50


def test_who_stops_listening_leaves_no_question_behind() -> None:
    flow = FlowControl(2)
    asked: list[int] = []

    def question(number: int) -> Callable[[int], int]:
        return lambda k: asked.append(number) or number  # type: ignore[func-returns-value]

    answers = flow.each([question(n) for n in range(100)], tokens=[1] * 100)
    next(answers)
    answers.close()
    assert len(asked) <= 5


def test_who_gives_up_is_not_taken_for_who_was_answered() -> None:
    flow = FlowControl(2)

    def question(number: int) -> Callable[[int], int]:
        def ask(k: int) -> int:
            if number == 3:
                flow.give_up()
            return number

        return ask

    given: list[int] = []
    with pytest.raises(CancelledError):
        given.extend(number for number, _ in flow.each([question(n) for n in range(50)], tokens=[1] * 50))
    assert len(given) < 50


def test_the_seconds_of_documents_are_told_apart_from_those_of_the_questions_before() -> None:
    clock = Clock()
    flow = flow_with(clock)

    def lasting(seconds: float) -> Callable[[int], None]:
        return lambda k: setattr(clock, "now", clock.now + seconds)

    for _ in range(6):
        flow.call(lasting(0.25), tokens=1)
    asked = flow.metrics()["answered"]
    assert flow.metrics(after=asked)["p50_s"] is None
    for _ in range(4):
        flow.call(lasting(2.0), tokens=1)
    assert flow.metrics()["p50_s"] == 0.25
    assert flow.metrics(after=asked)["p50_s"] == 2.0


def test_metrics_count_what_happened() -> None:
    clock = Clock()
    flow = flow_with(clock)

    def slow(k: int) -> None:
        clock.now += 2.0

    for _ in range(19):
        flow.call(slow, tokens=100)
    ask, _ = scripted(clock, failing("rate-limited", 1.0), failing("timeout"))
    flow.call(ask, tokens=100)
    counted = flow.metrics()
    assert (counted["requests"], counted["answered"], counted["retries"]) == (22, 20, 2)
    assert counted["failures"] == {"rate-limited": 1, "timeout": 1}
    assert (counted["p50_s"], counted["p95_s"], counted["k_now"]) == (2.0, 2.0, 10)
    assert counted["tokens"] == 2000
    assert 40 < counted["tokens_per_s"] < 60
    assert FlowControl().metrics()["tokens_per_s"] is None


def test_who_never_answered_is_not_waited_for_and_who_did_is() -> None:
    clock = Clock()
    flow = flow_with(clock)
    ask, asked = scripted(clock, *[failing("connection") for _ in range(8)])
    with pytest.raises(TeacherFailure):
        flow.call(ask, tokens=1)
    assert (len(asked), clock.slept) == (1, [])
    # The control: once anything came from there, it is a server that was lost.
    flow = flow_with(clock)
    ask, asked = scripted(clock, None, failing("connection"), failing("connection"), None)
    flow.call(ask, tokens=1)
    flow.call(ask, tokens=1)
    assert len(asked) == 4
