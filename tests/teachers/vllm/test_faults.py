"""Every fault between us and a real server: what it is taken for, and that no document is lost or paid for twice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from latentforge.data import ShardSet
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.http.client import HttpClient
from latentforge.teachers.http.flow import FlowControl
from latentforge.teachers.http.openai import OpenAITeacher, served_identity
from latentforge.teachers.http.probe import ServerFacts

from ..proxy import (
    CollapsedKeys,
    Cut,
    Drop,
    Fault,
    FaultProxy,
    FewerThanK,
    Hang,
    Malformed,
    NoLogprobs,
    NotFinite,
    RateLimited,
    ServerError,
    ShiftedEcho,
    Slow,
    Status,
    Unauthorized,
    WrongIds,
)
from .conftest import TOLERANCE, K, Rows, all_rows, worst_difference

DOCUMENTS = 6


class _Clock:
    """Time that passes only by waiting, so that a wait of 32 s is told and not endured."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture(scope="module")
def facts(vllm_url: str, served_folder: Path) -> ServerFacts:
    """What the server can do, found out once."""
    teacher = OpenAITeacher.open(vllm_url, "tiny", served_folder)
    try:
        return teacher.facts
    finally:
        teacher.close()


@pytest.fixture
def teacher(proxy: FaultProxy, facts: ServerFacts, clock: _Clock) -> Iterator[OpenAITeacher]:
    """A client of the proxy that asks one document at a time, and has found out already what the server can do."""
    flow = FlowControl(
        1, clock=lambda: clock.now, sleep=clock.sleep, jitter=random.Random(1).random, restore_after=2, k_low=10
    )
    found = OpenAITeacher(
        HttpClient(proxy.url, timeout=60.0, connections=1),
        "tiny",
        identity=served_identity("tiny", revision=None, tokenizer_sha256="0" * 64),
        vocab_size=320,
        flow=flow,
    )
    found._facts = facts
    yield found
    found.close()


PASSING: list[tuple[Fault, str]] = [
    (RateLimited(retry_after=7), "rate-limited"),
    (RateLimited(retry_after=None), "rate-limited"),
    (ServerError(500), "server-error"),
    (ServerError(503), "server-error"),
    (Drop(), "cut"),
    (Drop(reset=True), "cut"),
    (Cut(), "cut"),
    (Cut(share=0.9, reset=True), "cut"),
    (Malformed(), "malformed"),
    (Malformed("<html>bad gateway</html>"), "malformed"),
]
FINAL: list[tuple[Fault, str]] = [
    (Unauthorized(), "unauthorized"),
    (Status(404, "The model `tiny` does not exist."), "model-not-found"),
    (Status(400, "prompt_logprobs must be non-negative"), "refused-request"),
    (NoLogprobs(), "no-logprobs"),
    (FewerThanK(5), "too-few"),
    (CollapsedKeys(), "collapsed"),
    (ShiftedEcho(), "shifted"),
    (WrongIds(), "wrong-ids"),
    (NotFinite(), "not-finite"),
]


def _named(case: object) -> str:
    return case if isinstance(case, str) else getattr(case, "name", "")


@pytest.mark.parametrize(("fault", "kind"), PASSING, ids=_named)
def test_what_passes_by_itself_costs_a_wait_and_no_document(
    teacher: OpenAITeacher,
    proxy: FaultProxy,
    clock: _Clock,
    served_data: ShardSet,
    hf_rows: Rows,
    fault: Fault,
    kind: str,
) -> None:
    documents = all_rows(served_data)[:DOCUMENTS]
    proxy.script([Fault(), fault, fault])
    found = dict(teacher.score(documents, k=K, temperatures=(1.0,)))
    assert sorted(found) == list(range(DOCUMENTS))
    # They are as long as the model's positions: their last token is not sent, its row is that of the generated one.
    assert sorted(proxy.documents) == sorted(tuple(tokens.tolist()[:-1]) for tokens in documents)
    assert teacher.metrics()["failures"] == {kind: 2}
    assert teacher.metrics()["retries"] == 2
    assert clock.waits
    # After a rate limit rows are shorter; what they say is what transformers says.
    whole = {number: targets for number, targets in found.items() if targets.ids.min() >= 0}
    assert len(whole) >= 2
    assert worst_difference({number: hf_rows[number] for number in whole}, whole)[0] <= TOLERANCE
    if isinstance(fault, Status) and fault.headers:
        assert max(clock.waits) >= 7.0


@pytest.mark.parametrize(("fault", "kind"), FINAL, ids=_named)
def test_what_would_be_answered_the_same_again_is_told_at_once(
    teacher: OpenAITeacher, proxy: FaultProxy, clock: _Clock, served_data: ShardSet, fault: Fault, kind: str
) -> None:
    documents = all_rows(served_data)[:DOCUMENTS]
    proxy.script([Fault(), Fault(), fault])
    answers = teacher.score(documents, k=K, temperatures=(1.0,))
    got = [next(answers)[0], next(answers)[0]]
    with pytest.raises(TeacherFailure) as caught:
        next(answers)
    assert caught.value.kind == kind
    # What was answered before it was given, and nothing was asked after it.
    assert got == [0, 1]
    assert proxy.outcomes == ["passed", "passed", fault.name]
    assert clock.waits == []


@pytest.mark.parametrize("fault", [Hang(), Slow(30.0)], ids=_named)
def test_a_server_that_keeps_silent_is_a_time_out_and_is_asked_again(
    proxy: FaultProxy, teacher: OpenAITeacher, served_data: ShardSet, fault: Fault
) -> None:
    documents = all_rows(served_data)[:2]
    impatient = OpenAITeacher(
        HttpClient(proxy.url, timeout=3.0, connections=1),
        "tiny",
        identity=teacher.identity,
        vocab_size=320,
        flow=teacher.flow,
    )
    impatient._facts = teacher.facts
    proxy.script([fault])
    found = dict(impatient.score(documents, k=K, temperatures=(1.0,)))
    impatient.close()
    assert sorted(found) == [0, 1]
    assert teacher.metrics()["failures"] == {"timeout": 1}


def test_a_server_that_is_gone_is_told_and_keeps_what_was_answered(
    served_folder: Path, vllm_url: str, served_data: ShardSet, clock: _Clock
) -> None:
    flow = FlowControl(1, clock=lambda: clock.now, sleep=clock.sleep, attempts=3)
    with FaultProxy(vllm_url) as proxy:
        teacher = OpenAITeacher.open(proxy.url, "tiny", served_folder, flow=flow)
        _ = teacher.facts
        answers = teacher.score(all_rows(served_data)[:DOCUMENTS], k=K, temperatures=(1.0,))
        got = [next(answers)[0]]
    with pytest.raises(TeacherFailure) as caught:
        got += [number for number, _ in answers]
    teacher.close()
    assert caught.value.kind in ("connection", "cut")
    assert got
    assert "teacher serve" in (caught.value.next or "") or caught.value.kind == "cut"
