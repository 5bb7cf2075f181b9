"""The fault table of docs/teachers.md, row by row: a real vLLM behind a proxy that does what servers and networks do.

Each row says what the user sees and that nothing was lost: what was answered is stored, and is not asked again.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentforge.data import ShardSet
from latentforge.teachers.cached import CachedTeacher
from latentforge.teachers.failures import KINDS, TeacherFailure
from latentforge.teachers.hf import HFTeacher
from latentforge.teachers.http import probe as probes
from latentforge.teachers.http.client import HttpClient
from latentforge.teachers.http.flow import Budget, FlowControl
from latentforge.teachers.http.openai import OpenAITeacher
from latentforge.teachers.http.probe import ServerFacts, probe
from latentforge.teachers.http.rows import Question
from latentforge.teachers.protocol import Tokens

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

K, ONE = 20, (1.0,)
DOCUMENTS = 12
FOR_EVER = 400
PAGE = Path(__file__).parents[3] / "docs" / "teachers.md"


class Hurried:
    """A clock whose waits take no time, and are remembered."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self.waits: list[float] = []
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return time.monotonic() + self.ahead

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.ahead += seconds
            self.waits.append(seconds)


@pytest.fixture
def documents(served_data: ShardSet) -> list[Tokens]:
    return [np.asarray(row[:10]) for row in served_data.train.rows(np.arange(DOCUMENTS))]


@pytest.fixture(scope="module")
def server_facts(vllm_url: str) -> ServerFacts:
    """What the server can do: asked once, so that scripts of faults meet documents alone."""
    client, flow = HttpClient(vllm_url), FlowControl()
    facts = probe(client, flow, "tiny", vocab_size=320, rows=320)
    client.close()
    assert flow.metrics()["failures"] == {}, "what a server may not be able to do is asked, and is no failure"
    return facts


@pytest.fixture
def ask(proxy: FaultProxy, server_facts: ServerFacts, served_folder: Path, tmp_path: Path) -> Iterator[Any]:
    """``ask(**flow)``: the served model behind the proxy and a store, as a score run and a trainer use it."""
    opened: list[CachedTeacher] = []

    def make(*, timeout: float = 60.0, **flow: Any) -> tuple[CachedTeacher, Hurried]:
        clock = Hurried()
        control = FlowControl(**{"concurrency": 4, "attempts": 3, "clock": clock, "sleep": clock.sleep, **flow})
        teacher = OpenAITeacher.open(proxy.url, "tiny", served_folder, flow=control, timeout=timeout)
        teacher._facts = server_facts
        cached = CachedTeacher.open(tmp_path / "kd.sqlite", teacher, k=K, temperatures=ONE)
        opened.append(cached)
        return cached, clock

    yield make
    for one in opened:
        one.close()


def scored(teacher: CachedTeacher, documents: list[Tokens]) -> dict[int, Any]:
    return dict(teacher.score(documents, k=K, temperatures=ONE))


def present(teacher: CachedTeacher, documents: list[Tokens]) -> int:
    return teacher.store.coverage(teacher.store.key(tokens) for tokens in documents).present


PASSING = {
    "429 with Retry-After": (RateLimited(retry_after=1), "rate-limited"),
    "429 without Retry-After": (RateLimited(retry_after=None), "rate-limited"),
    "5xx": (ServerError(503), "server-error"),
    "cut in mid-body": (Cut(), "cut"),
    "connection reset in mid-body": (Cut(reset=True), "cut"),
    "gone before an answer": (Drop(), "cut"),
    "malformed JSON": (Malformed(), "malformed"),
}
LASTING = {
    "401": (Unauthorized(), "unauthorized", 6),
    "404": (Status(404, "The model `tiny` does not exist."), "model-not-found", 2),
    "429 with Retry-After": (RateLimited(retry_after=1), "rate-limited", 3),
    "5xx": (ServerError(500), "server-error", 3),
    "cut in mid-body": (Cut(), "cut", 3),
    "gone before an answer": (Drop(reset=True), "cut", 3),
    "malformed JSON": (Malformed("<html>"), "malformed", 1),
    "refused question": (Status(422, "prompt_logprobs is not allowed"), "refused-request", 2),
    "too long": (Status(400, "This model's maximum context length is 8 tokens."), "too-long", 2),
    "200 without log-probabilities": (NoLogprobs(), "no-logprobs", 1),
    "fewer than k": (FewerThanK(5), "too-few", 1),
    "keys collapsed": (CollapsedKeys(), "collapsed", 1),
    "shifted by one": (ShiftedEcho(), "shifted", 1),
    "wrong ids": (WrongIds(), "wrong-ids", 1),
    "not finite": (NotFinite(), "not-finite", 1),
}


@pytest.mark.parametrize("row", PASSING)
def test_a_fault_that_passes_costs_a_retry_and_no_document(
    row: str, ask: Any, proxy: FaultProxy, documents: list[Tokens]
) -> None:
    fault, kind = PASSING[row]
    teacher, clock = ask()
    proxy.script([Fault(), fault, Fault(), Fault(), fault])
    assert sorted(scored(teacher, documents)) == list(range(DOCUMENTS))
    assert proxy.unused == 0
    counted = teacher.metrics()
    assert counted["failures"] == {kind: 2}
    assert counted["retries"] == 2
    assert clock.waits, "it waited before it asked again"
    assert Counter(proxy.documents).most_common(1)[0][1] == 1, "no document was paid for twice"
    assert present(teacher, documents) == DOCUMENTS


@pytest.mark.parametrize("row", LASTING)
def test_a_fault_that_stays_ends_it_with_its_reason_and_keeps_what_was_answered(
    row: str, ask: Any, proxy: FaultProxy, documents: list[Tokens]
) -> None:
    fault, kind, code = LASTING[row]
    teacher, _ = ask()
    proxy.script([Fault()] * 3 + [fault] * FOR_EVER)
    with pytest.raises(TeacherFailure) as caught:
        scored(teacher, documents)
    assert (caught.value.kind, int(caught.value.code)) == (kind, code)
    assert f"[{kind}]" in str(caught.value)
    assert caught.value.next
    kept = proxy.documents
    assert present(teacher, documents) == len(kept) == 3, "what was answered is stored"
    proxy.script([])
    assert sorted(scored(teacher, documents)) == list(range(DOCUMENTS))
    assert Counter(proxy.documents).most_common(1)[0][1] == 1, "and is not asked again"


def test_a_server_that_hangs_is_a_time_out(ask: Any, proxy: FaultProxy, documents: list[Tokens]) -> None:
    teacher, _ = ask(timeout=0.5, attempts=1, concurrency=1)
    proxy.script([Fault(), Fault(), Hang()])
    with pytest.raises(TeacherFailure) as caught:
        scored(teacher, documents)
    assert (caught.value.kind, int(caught.value.code)) == ("timeout", 3)
    assert present(teacher, documents) == 2


def test_a_slow_server_is_waited_for(ask: Any, proxy: FaultProxy, documents: list[Tokens]) -> None:
    teacher, _ = ask()
    proxy.script([Slow(0.4), Slow(0.4)])
    assert len(scored(teacher, documents)) == DOCUMENTS
    assert teacher.metrics()["retries"] == 0


def test_a_server_that_is_gone_leaves_the_stored_rows(
    ask: Any, proxy: FaultProxy, documents: list[Tokens], served_folder: Path, tmp_path: Path
) -> None:
    teacher, _ = ask(attempts=1)
    scored(teacher, documents[:4])
    teacher.close()
    nobody = OpenAITeacher.open("http://127.0.0.1:9/v1", "tiny", served_folder, flow=FlowControl(attempts=1))
    cached = CachedTeacher.open(tmp_path / "kd.sqlite", nobody, k=K, temperatures=ONE)
    given = []
    with pytest.raises(TeacherFailure) as caught:
        given.extend(number for number, _ in cached.score(documents, k=K, temperatures=ONE))
    assert given == [0, 1, 2, 3]
    assert (caught.value.kind, int(caught.value.code)) == ("connection", 6)
    assert len(dict(cached.score(documents[:4], k=K, temperatures=ONE))) == 4, "what is stored needs no server"
    cached.close()


def test_retry_after_is_the_wait_and_rows_with_fewer_entries_are_mixed_in(
    ask: Any, proxy: FaultProxy, documents: list[Tokens], served_folder: Path
) -> None:
    teacher, clock = ask(concurrency=1, restore_after=5)
    proxy.script([Fault(), RateLimited(retry_after=7)])
    found = scored(teacher, documents)
    assert max(clock.waits) >= 7.0
    widths = [int((found[number].ids >= 0).sum(axis=1).max()) for number in range(DOCUMENTS)]
    assert Counter(widths) == {10: 5, 20: DOCUMENTS - 5}
    right = HFTeacher.open(served_folder)
    for number, live in right.score(documents, k=K, temperatures=ONE):
        kept = teacher.store.get(documents[number])
        width = widths[number]
        assert np.array_equal(found[number].ids[:, :width], live.ids[:, :width])
        assert (kept.ids[:, width:] == -1).all()
        assert np.isneginf(kept.logprobs[:, width:]).all()
        mass = np.exp(kept.logprobs.astype(np.float64)).sum(axis=1) + np.exp(kept.tails[1.0].astype(np.float64))
        assert np.abs(mass - 1.0).max() < 1e-2, "the rest mass is that of the entries that the row has"


@pytest.mark.parametrize("budget", [Budget(requests=5), Budget(tokens=5 * 11)])
def test_a_budget_ends_it_before_it_is_exceeded(
    ask: Any, proxy: FaultProxy, documents: list[Tokens], budget: Budget
) -> None:
    teacher, _ = ask(budget=budget)
    with pytest.raises(TeacherFailure) as caught:
        scored(teacher, documents)
    assert (caught.value.kind, int(caught.value.code)) == ("budget", 2)
    assert len(proxy.requests) == present(teacher, documents) == 5


def test_no_more_requests_are_open_than_was_said(ask: Any, proxy: FaultProxy, documents: list[Tokens]) -> None:
    teacher, _ = ask(concurrency=3)
    proxy.delay = 0.05
    scored(teacher, documents)
    assert 1 < proxy.most_in_flight <= 3


def test_both_forms_of_question_give_the_rows_of_the_model_itself(
    vllm_url: str, server_facts: ServerFacts, served_folder: Path, served_data: ShardSet
) -> None:
    client, facts = HttpClient(vllm_url), server_facts
    assert (facts.form, facts.max_k) == ("prompt_logprobs", 320)
    assert facts.proved_nats < 1e-3
    teacher = HFTeacher.open(served_folder)
    row = np.asarray(served_data.heldout.rows([0])[0])
    for tokens in (row[:2], row[:31], row):
        live = next(teacher.score([tokens], k=50, temperatures=ONE))[1]
        for form in ("prompt_logprobs", "echo"):
            whole = facts.max_tokens is not None and len(tokens) >= facts.max_tokens
            asked = Question(tuple(map(int, tokens)), 50, 320, 320, last_generated=whole)
            found = probes.ask(client, "tiny", asked, form).targets
            assert np.array_equal(found.ids, live.ids)
            assert np.abs(found.logprobs - live.logprobs).max() < 1e-4
            assert np.abs(found.tails[1.0] - live.tails[1.0]).max() < 1e-3
    client.close()


def test_every_row_of_the_fault_table_names_its_test_and_every_kind_has_a_row() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## Flow control")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| ") and "`test_" in line
    ]
    assert {re.findall(r"`([a-z-]+)`", row[1])[0] for row in rows if "`" in row[1]} == set(KINDS)
    tests = "\n".join(p.read_text(encoding="utf-8") for p in Path(__file__).parents[1].rglob("test_*.py"))
    for row in rows:
        assert "nothing" in row[-2], row
        for name in re.findall(r"`(test_\w+)`", row[-1]):
            assert f"def {name}(" in tests, f"{row[0]}: {name} is no test"
    shown = {row[0] for row in rows}
    assert shown >= {*PASSING, *LASTING}, f"without a row: {({*PASSING, *LASTING}) - shown}"
