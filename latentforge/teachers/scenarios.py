"""``latentforge bench teachers``: the same documents asked of a hosted API, a local and a remote vLLM.

Every document is asked twice through a store: the second time all of them must come from it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentforge.data.tokenizer import Tokenizer
from latentforge.errors import FailedError, LatentForgeError, RefusedError
from latentforge.spec.sections import TeacherSpec
from latentforge.teachers.answers import OF_ONE_ANSWER, AnswerStore, Asking, ask_all
from latentforge.teachers.cached import CachedTeacher
from latentforge.teachers.failures import TeacherFailure, public_url
from latentforge.teachers.http.chat import ChatAnswer
from latentforge.teachers.http.openai import OpenAITeacher
from latentforge.teachers.opening import CHAT_ONLY, open_teacher
from latentforge.teachers.protocol import Limits, Scorer, Tokens
from latentforge.teachers.serving.local import ServedTeacher

Name = Literal["hosted", "local", "remote"]
Say = Callable[[str], None]
TITLES: Mapping[Name, str] = {"hosted": "hosted API", "local": "local vLLM", "remote": "remote vLLM"}
CHAT_TOKENS = 16
CHAT_K = 20


@dataclass(frozen=True)
class Wanted:
    """What every scenario is asked: ``documents`` different ones of ``tokens`` tokens, ``k`` entries a position."""

    k: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Scenario:
    """One teacher to measure; ``teacher`` None where none is configured, and ``missing`` says what would name it."""

    name: Name
    teacher: TeacherSpec | None
    folder: Path | None
    missing: str = ""


@dataclass
class Figures:
    """What was measured; None is not measured. Of a scenario that fails, what was counted until then.

    ``tokens`` of ``documents`` were scored (``capability`` score) or written (chat) in ``seconds``. ``charged_tokens``
    are those of all answered requests, prompts and answers, the questions included that found out what the server can
    do. ``p50_s`` and ``p95_s`` are seconds a document. ``k`` entries were wanted and ``k_least`` is the fewest that a
    row has. ``failures`` counts failed attempts by kind, ``asked_again`` requests for what was stored already.
    ``start_s`` is how long a vLLM of our own took to answer; it is in no other figure.
    """

    capability: Literal["score", "chat"] | None = None
    url: str | None = None
    model: str | None = None
    k: int | None = None
    k_least: int | None = None
    documents: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_s: float | None = None
    p50_s: float | None = None
    p95_s: float | None = None
    requests: int | None = None
    retries: int | None = None
    rate_limit_events: int | None = None
    failures: dict[str, int] = field(default_factory=dict)
    charged_tokens: int | None = None
    hit_rate: float | None = None
    rows_from_store: int | None = None
    asked_again: int | None = None
    store_bytes: int | None = None
    start_s: float | None = None

    def count(self, client: OpenAITeacher, probed: int | None) -> None:
        """Take over the counts of a client's gate; latencies are of what was answered after the first ``probed``.

        None: it was not asked for a document.
        """
        found = client.flow.metrics(after=sys.maxsize if probed is None else probed)
        self.url, self.model = public_url(client.client.url), client.model
        self.requests, self.retries = found["requests"], found["retries"]
        self.rate_limit_events, self.failures = found["rate_limit_events"], found["failures"]
        self.charged_tokens, self.p50_s, self.p95_s = found["tokens"], found["p50_s"], found["p95_s"]


@dataclass
class Measured:
    """What one scenario came to. ``verdict`` is ``unknown`` where it was not run; ``said`` is why it is no pass."""

    scenario: Scenario
    verdict: Literal["pass", "fail", "unknown"]
    said: str
    next: str | None = None
    figures: Figures = field(default_factory=Figures)

    def as_json(self) -> dict[str, Any]:
        """The line for programs; the same names whatever the verdict."""
        about = {"scenario": self.scenario.name, "verdict": self.verdict, "said": self.said, "next": self.next}
        return about | asdict(self.figures)


def run_scenario(
    scenario: Scenario, env: Mapping[str, str], wanted: Wanted, store: Path, say: Say = lambda line: None
) -> Measured:
    """Measure one scenario; a failure is its verdict, not an exception.

    ``store`` is the file for its answers, which must not exist: RefusedError, since rows that are read are no speed of
    a teacher. ``say`` is told what a reader should know meanwhile, also by other threads.
    """
    spec, figures = scenario.teacher, Figures()
    if spec is None or scenario.folder is None:
        return Measured(scenario, "unknown", "not configured", scenario.missing)
    check_unused(store)
    measure = _chats if spec.backend in CHAT_ONLY else _scores
    try:
        measure(spec, scenario.folder, env, wanted, store, figures, say)
        if figures.asked_again:
            raise FailedError(f"{figures.asked_again} requests were made for what was stored")
    except LatentForgeError as error:
        return Measured(scenario, "fail", str(error), _next(error, scenario.name, spec), figures)
    return Measured(scenario, "pass", f"{figures.documents} documents, each asked once", None, figures)


def check_unused(store: Path) -> None:
    """Refuse a file of answers that exists."""
    if store.exists():
        raise RefusedError(
            f"{store} exists: its rows would be read, and no teacher measured", next="name another folder in --store"
        )


def _scores(
    spec: TeacherSpec,
    folder: Path,
    env: Mapping[str, str],
    wanted: Wanted,
    store: Path,
    figures: Figures,
    say: Say,
) -> None:
    _check(Limits(Tokenizer.open(folder).vocab_size, None, None), wanted, "its vocabulary has")
    inner = open_teacher(spec, folder, "cpu", env, say=say)
    client = inner.client if isinstance(inner, ServedTeacher) else inner
    assert isinstance(client, OpenAITeacher)
    teacher: CachedTeacher | None = None
    probed = None
    try:
        if isinstance(inner, ServedTeacher):
            inner.start()  # the time that it takes is not its speed
            figures.start_s = inner.server.seconds_to_start
        _check(inner.limits, wanted, "it answers")
        figures.capability, figures.k = "score", wanted.k
        teacher = CachedTeacher.open(store, inner, k=wanted.k, temperatures=(1.0,))
        probed = client.flow.metrics()["answered"]
        documents = drawn_documents(teacher.vocab_size, wanted.documents, wanted.tokens)
        begin = time.perf_counter()
        figures.k_least = _ask_all(teacher, documents, wanted.k)
        figures.seconds = time.perf_counter() - begin
        paid = client.flow.metrics()["requests"]
        _ask_all(teacher, documents, wanted.k)
        figures.asked_again = client.flow.metrics()["requests"] - paid
        figures.documents, figures.tokens = wanted.documents, wanted.documents * wanted.tokens
        figures.tokens_per_s = figures.tokens / figures.seconds
        found = teacher.metrics()
        figures.hit_rate, figures.rows_from_store = found["hit_rate"], found["rows_from_store"]
    finally:
        figures.count(client, probed)
        (inner if teacher is None else teacher).close()
        figures.store_bytes = _size(store)


def _check(limits: Limits, wanted: Wanted, has: str) -> None:
    """Refuse what a teacher cannot be asked: fewer entries or shorter documents would be another measurement."""
    if limits.max_k is not None and wanted.k > limits.max_k:
        raise RefusedError(f"k = {wanted.k}: {has} at most {limits.max_k} entries", next=f"--k {limits.max_k}")
    if limits.max_tokens is not None and wanted.tokens > limits.max_tokens:
        raise RefusedError(
            f"documents of {wanted.tokens} tokens are longer than its {limits.max_tokens} positions",
            next=f"--tokens {limits.max_tokens}",
        )


def _ask_all(teacher: Scorer, documents: Sequence[Tokens], k: int) -> int:
    """Score every document; the fewest entries of a row. FailedError where one is missing or not finite."""
    got, fewest = {}, k
    for number, targets in teacher.score(documents, k=k, temperatures=(1.0,)):
        # After a rate limit a row may end in absent entries: what is there is finite.
        there = targets.ids >= 0
        fewest = min(fewest, int(there.sum(axis=1).min()))
        if not fewest or not np.isfinite(targets.logprobs[there]).all():
            raise FailedError(f"document {number} has a row without a finite log-probability")
        got[number] = len(targets.ids)
    if got != {number: len(tokens) - 1 for number, tokens in enumerate(documents)}:
        raise FailedError(f"{len(got)} of {len(documents)} documents were answered")
    return fewest


def _chats(
    spec: TeacherSpec,
    folder: Path,
    env: Mapping[str, str],
    wanted: Wanted,
    store: Path,
    figures: Figures,
    say: Say,
) -> None:
    """A chat API scores no documents: its answers to short prompts are asked for, as a pipeline asks for them."""
    k = min(wanted.k, CHAT_K)
    prompts = [f"Write one sentence about the number {number}." for number in range(wanted.documents)]
    asking = Asking(CHAT_TOKENS, k, seed=11)
    teacher = open_teacher(spec, folder, "cpu", env, say=say)
    assert isinstance(teacher, OpenAITeacher)
    try:
        with AnswerStore(store) as answers:
            begin = time.perf_counter()
            said = dict(ask_all(teacher, prompts, answers, asking))
            figures.seconds = time.perf_counter() - begin
            answered = [answer for answer in said.values() if isinstance(answer, ChatAnswer)]
            unusable = [answer for answer in said.values() if isinstance(answer, TeacherFailure)]
            if not answered:
                raise unusable[0]
            figures.capability, figures.k = "chat", k
            rows = [row for answer in answered for row in answer.positions]
            figures.k_least = min((len(row.top) for row in rows), default=None)
            # An answer of no use is stored too; a prompt that was refused has none.
            stored = [
                prompts[number]
                for number, one in said.items()
                if isinstance(one, ChatAnswer) or one.kind in OF_ONE_ANSWER
            ]
            paid = teacher.flow.metrics()["requests"]
            again = len(dict(ask_all(teacher, stored, answers, asking)))
            figures.asked_again = teacher.flow.metrics()["requests"] - paid
        figures.documents, figures.tokens = len(answered), len(rows)
        figures.tokens_per_s = figures.tokens / figures.seconds
        figures.rows_from_store = again - figures.asked_again
        figures.hit_rate = figures.rows_from_store / (len(said) + again)
    finally:
        figures.count(teacher, 0)
        teacher.close()
        figures.store_bytes = _size(store)


def _size(store: Path) -> int | None:
    """Bytes of a closed file of answers, so that what its journal held is in it; None where none was made."""
    return store.stat().st_size if store.exists() else None


def drawn_documents(vocab_size: int, count: int, length: int) -> list[Tokens]:
    """``count`` different documents of ``length`` ids, the same every time."""
    generator = np.random.Generator(np.random.PCG64(11))
    return [generator.integers(0, vocab_size, size=length) for _ in range(count)]


def _next(error: LatentForgeError, name: Name, spec: TeacherSpec) -> str | None:
    """What to do about a failure, in this command's own options."""
    if not isinstance(error, TeacherFailure):
        return error.next
    model = "--hosted-model NAME" if name == "hosted" else "--model NAME"
    key = spec.api_key_env or ("VLLM_REMOTE_API_KEY" if name == "remote" else None)
    ours = {
        "unauthorized": None if key is None else f"put a key that it takes into the variable {key}",
        "model-not-found": f"{model}, one that  latentforge teacher check --url URL  lists",
        "too-few": "a smaller --k",
        "too-long": "fewer --tokens",
        "rate-limited": "a smaller --concurrency, or the same command later",
        "timeout": "a smaller --concurrency",
        "server-error": "look at the server's log, then the same command again",
        "cut": "look at the server's log, then the same command again",
        "connection": "start the server (latentforge teacher serve FOLDER), or name its URL",
    }
    return ours.get(error.kind) or error.next
