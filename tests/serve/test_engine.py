"""The thread that computes: who joins, who waits, who is given up, and what an error costs."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentforge.errors import RefusedError
from latentforge.serve.engine import Engine, Event, Order
from latentforge.serve.limits import Limits
from latentforge.serve.measures import Measures
from latentforge.serve.refusing import Refusal
from latentforge.students.latent.requests import Request, Sampling

from .conftest import Gated


class Bench:
    """An engine of a gated model; what it posts runs here, and what orders hear is in ``heard``."""

    def __init__(self, opening: Callable[[], Any] | None = None, **limits: Any) -> None:
        self.model, self.heard = Gated(), queue.SimpleQueue[Event]()
        self.changes = queue.SimpleQueue[str]()
        self.measures = Measures()
        self.engine = Engine(
            opening or (lambda: SimpleNamespace(model=self.model)),  # type: ignore[arg-type]
            Limits(**limits),
            self.measures,
            lambda what: what(),
            lambda: self.changes.put(self.engine.state),
        )
        self.engine.start()
        self.first = self.changes.get()

    def order(self, tokens: int = 4, *, seed: int = 1, seconds: float = 3600, prompt: tuple[int, ...] = ()) -> Order:
        return Order(Request(prompt, tokens, seed), time.monotonic() + seconds, self.heard.put)

    def submit(self, *orders: Order) -> list[Order]:
        self.engine.submit(orders)
        return list(orders)

    def step(self) -> None:
        """Let the step that is being drawn end."""
        self.model.drawing.acquire()
        self.model.let.release()

    def hear(self, count: int) -> list[tuple[int, int, str | None]]:
        """The next events: number of the order, of its tokens, and its end."""
        found = [self.heard.get() for _ in range(count)]
        return [(event.order.number, len(event.tokens), event.end) for event in found]


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*given: Any, **limits: Any) -> Bench:
        made.append(Bench(*given, **limits))
        return made[-1]

    yield make
    for one in made:
        one.engine.stop(0)
        one.model.let.release(1000)
        assert one.engine.ended.wait(60)


def test_texts_join_the_batch_between_two_chunks_and_leave_it_when_they_are_over(bench: Callable[..., Bench]) -> None:
    one = bench()
    (first,) = one.submit(one.order(6))
    one.step()
    assert one.hear(1) == [(first.number, 2, None)]
    one.model.drawing.acquire()  # the second step has begun: who comes now joins after it
    (second,) = one.submit(one.order(2, seed=2))
    one.model.let.release()
    assert one.hear(1) == [(first.number, 2, None)]
    one.step()
    assert one.hear(2) == [(first.number, 2, "length"), (second.number, 2, "length")]
    assert one.model.rows == [1, 1, 2]


def test_more_than_the_queue_holds_is_refused_with_a_time_to_come_back(bench: Callable[..., Bench]) -> None:
    one = bench(max_batch=2, queue=3)
    one.submit(*[one.order() for _ in range(2)])
    one.model.drawing.acquire()
    one.submit(*[one.order() for _ in range(2)])
    with pytest.raises(Refusal) as refusal:
        one.submit(*[one.order() for _ in range(2)])  # two do not fit, so none of them waits
    assert (refusal.value.status, refusal.value.code) == (429, "queue_full")
    assert int(refusal.value.headers["Retry-After"]) >= 1
    one.submit(one.order())
    one.model.let.release(100)
    assert len(one.hear(10)) == 10
    assert max(one.model.rows) == 2


def test_a_text_past_its_deadline_ends_with_what_it_has(bench: Callable[..., Bench]) -> None:
    one = bench(max_batch=1)
    late, waiting = one.submit(one.order(40), one.order(40, seconds=-1))
    one.step()
    assert sorted(one.hear(2)) == [(late.number, 2, None), (waiting.number, 0, "deadline")]
    one.model.drawing.acquire()
    late.until = time.monotonic()
    one.model.let.release()
    assert one.hear(2) == [(late.number, 2, None), (late.number, 0, "deadline")]


@pytest.mark.parametrize("end", ["deadline", "cancelled", "stopping"])
def test_a_step_of_many_draws_ends_with_the_text_that_it_is_for(bench: Callable[..., Bench], end: str) -> None:
    one, many = bench(), Sampling("vote", 0.0, draws=5000)
    order = Order(Request((), 4, 1, many), time.monotonic() + 3600, one.heard.put)
    one.submit(order)
    one.model.drawing.acquire()
    if end == "deadline":
        order.until = time.monotonic()
    elif end == "cancelled":
        one.engine.give_up([order])
    else:
        one.engine.stop(0)
    one.model.let.release(100)
    if end != "stopping":
        (last,) = one.submit(one.order(2))
        heard = one.hear(1 if end == "cancelled" else 2)
        assert heard[-1] == (last.number, 2, "length")
    else:
        heard = one.hear(1)
    assert end == "cancelled" or heard[0] == (order.number, 0, end)
    assert one.model.rows == ([1] if end == "stopping" else [1, 1])  # 1024 draws of the 5000


def test_what_nobody_waits_for_is_not_written_on(bench: Callable[..., Bench]) -> None:
    one = bench()
    gone, stays = one.submit(one.order(2000), one.order(8, seed=2))
    one.step()
    one.hear(2)
    one.model.drawing.acquire()
    one.engine.give_up([gone])
    one.model.let.release(100)
    assert [number for number, _, _ in one.hear(4)].count(stays.number) == 3
    assert one.model.rows == [2, 2, 1, 1]
    assert one.measures.texts.labels("cancelled")._value.get() == 1


def test_an_error_ends_the_texts_that_it_met_and_no_other(
    bench: Callable[..., Bench], capfd: pytest.CaptureFixture[str]
) -> None:
    one = bench()
    bad = one.submit(one.order(4, prompt=(13, 13)))[0]
    assert one.hear(1) == [(bad.number, 0, "broken")]
    both = one.submit(one.order(4), one.order(4, seed=66))
    one.step()
    if (first := one.hear(1)[0])[2] is None:  # the second joined a step later
        one.step()
    events = sorted([first, *one.hear(1)])
    assert [end for _, _, end in events] == ["broken", "broken"]
    good = one.submit(one.order(2))[0]
    one.step()
    assert one.hear(1) == [(good.number, 2, "length")]
    assert len(both) == 2
    assert "this text breaks the step" in capfd.readouterr().err  # for who runs it, not for who asks


def test_a_stop_lets_texts_finish_and_be_scored_and_takes_no_more(bench: Callable[..., Bench]) -> None:
    one = bench()
    (under_way,) = one.submit(one.order(4))
    one.model.drawing.acquire()
    assert one.engine.stop(3600) == 1
    with pytest.raises(Refusal) as refusal:
        one.submit(one.order())
    assert (refusal.value.status, refusal.value.code) == (503, "stopping")
    one.model.let.release(10)
    assert one.hear(2)[1] == (under_way.number, 2, "length")
    scores = queue.SimpleQueue[Any]()
    one.engine.score((1, 2, 3), scores.put)  # the text is over, and its answer is not
    assert scores.get(timeout=60) == [0.0, -1.0, -2.0]
    one.engine.stop(0)
    assert one.engine.ended.wait(60)
    one.engine.score((1, 2, 3), scores.put)
    assert scores.get(timeout=60) is None
    assert one.engine.cut == 0


def test_a_stop_whose_grace_is_over_cuts_texts_off_and_says_so(bench: Callable[..., Bench]) -> None:
    one = bench(max_batch=1)
    orders = one.submit(one.order(4000), one.order(4))
    one.model.drawing.acquire()
    one.engine.stop(0)
    one.model.let.release(10)
    assert one.hear(3)[1:] == [(order.number, 0, "stopping") for order in orders]
    assert one.engine.ended.wait(60)
    assert one.engine.cut == 2


def test_a_folder_that_cannot_be_opened_ends_the_engine(bench: Callable[..., Bench]) -> None:
    def opening() -> Any:
        raise RefusedError(f"{Path('nowhere')} holds no student")

    one = bench(opening)
    assert (one.first, str(one.engine.failure)) == ("failed", "nowhere holds no student")
    with pytest.raises(Refusal) as refusal:
        one.submit(one.order())
    assert refusal.value.status == 503
    assert "nowhere" not in str(refusal.value)


def test_a_text_is_scored_between_two_steps(bench: Callable[..., Bench]) -> None:
    one, scores = bench(), queue.SimpleQueue[Any]()
    one.engine.score((1, 2, 3), scores.put)
    assert scores.get() == [0.0, -1.0, -2.0]
