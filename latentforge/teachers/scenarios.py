"""``latentforge bench teachers``: the same documents asked of a hosted API, a local and a remote vLLM.

Every document is asked twice through a store: the second time all of them must come from it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentforge.data.tokenizer import Tokenizer
from latentforge.errors import FailedError, LatentForgeError
from latentforge.spec.sections import TeacherSpec
from latentforge.teachers.cached import CachedTeacher
from latentforge.teachers.opening import CHAT_ONLY, open_teacher
from latentforge.teachers.protocol import Scorer, Tokens
from latentforge.teachers.serving.local import ServedTeacher
from latentforge.verdicts.exitcode import ExitCode

Name = Literal["hosted", "local", "remote"]
TITLES: Mapping[Name, str] = {
    "hosted": "hosted API, with a key",
    "local": "local vLLM",
    "remote": "remote vLLM",
}
_CHAT_TOKENS = 16
_CHAT_K = 20


@dataclass(frozen=True)
class Scenario:
    """One teacher to measure; ``teacher`` None where none is configured, and ``missing`` says what would name it."""

    name: Name
    teacher: TeacherSpec | None
    folder: Path | None
    missing: str = ""


@dataclass
class Measured:
    """What one scenario came to. ``verdict`` is ``unknown`` where it was not run; ``figures`` are those of the flow."""

    name: Name
    verdict: Literal["pass", "fail", "unknown"]
    said: str
    next: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The line for programs."""
        about = {"scenario": self.name, "verdict": self.verdict, "said": self.said, "next": self.next}
        return about | self.figures


def run_scenario(
    scenario: Scenario, env: Mapping[str, str], *, k: int, documents: int, length: int, store: Path, device: str = "cpu"
) -> Measured:
    """Measure one scenario; a failure is its verdict, not an exception. ``store`` is the file of its answers."""
    spec = scenario.teacher
    if spec is None:
        return Measured(scenario.name, "unknown", "not configured", scenario.missing)
    try:
        if spec.backend in CHAT_ONLY:
            return _chats(scenario, spec, env, k=k, prompts=documents)
        return _scores(scenario, spec, env, k=k, documents=documents, length=length, store=store, device=device)
    except LatentForgeError as error:
        return Measured(scenario.name, "fail", str(error), error.next)


def _scores(
    scenario: Scenario,
    spec: TeacherSpec,
    env: Mapping[str, str],
    *,
    k: int,
    documents: int,
    length: int,
    store: Path,
    device: str,
) -> Measured:
    kept = spec.model_copy(update={"cache": str(store)})
    teacher = open_teacher(kept, scenario.folder, device, env, k=k)
    try:
        assert isinstance(teacher, CachedTeacher)
        if isinstance(teacher.teacher, ServedTeacher):
            teacher.teacher.start()  # the time that it takes is not its speed
        limit = teacher.teacher.limits.max_tokens
        asked = drawn_documents(teacher.vocab_size, documents, min(length, limit or length))
        begin = time.perf_counter()
        _ask_all(teacher, asked, k)
        seconds = time.perf_counter() - begin
        paid = int(teacher.metrics().get("requests", 0))
        _ask_all(teacher, asked, k)
        found = teacher.metrics()
        again = int(found.get("requests", 0)) - paid
        figures = {name: found.get(name) for name in ("requests", "retries", "p50_s", "p95_s", "rate_limit_events")}
        figures |= {"documents": documents, "tokens": sum(map(len, asked)), "k": k, "hit_rate": found["hit_rate"]}
        figures |= {"tokens_per_s": figures["tokens"] / seconds, "rows_from_store": found["rows_from_store"]}
    finally:
        teacher.close()
    # Closed, so that what the journal held is in the file.
    figures |= {"store_bytes": store.stat().st_size, "asked_again": again}
    if again:
        return Measured(scenario.name, "fail", f"{again} requests were made for what was stored", None, figures)
    return Measured(scenario.name, "pass", f"{documents} documents, each asked once", None, figures)


def _ask_all(teacher: Scorer, documents: Sequence[Tokens], k: int) -> None:
    got = {}
    for number, targets in teacher.score(documents, k=k, temperatures=(1.0,)):
        # After a rate limit a row may end in absent entries: what is there is finite.
        there = targets.ids >= 0
        if not there.any(axis=1).all() or not np.isfinite(targets.logprobs[there]).all():
            raise FailedError(f"document {number} has a row without a finite log-probability")
        got[number] = len(targets.ids)
    if got != {number: len(tokens) - 1 for number, tokens in enumerate(documents)}:
        raise FailedError(f"{len(got)} of {len(documents)} documents were answered")


def _chats(scenario: Scenario, spec: TeacherSpec, env: Mapping[str, str], *, k: int, prompts: int) -> Measured:
    """A chat API scores no documents: its answers to short prompts are asked, with their rows."""
    from latentforge.teachers.http.openai import OpenAITeacher

    teacher = open_teacher(spec, scenario.folder, "cpu", env)
    try:
        assert isinstance(teacher, OpenAITeacher)
        positions = 0
        begin = time.perf_counter()
        for number in range(prompts):
            message = {"role": "user", "content": f"Write one sentence about the number {number}."}
            answer = teacher.chat([message], max_tokens=_CHAT_TOKENS, k=min(k, _CHAT_K), temperature=1.0, seed=number)
            positions += len(answer.positions)
        seconds = time.perf_counter() - begin
        found = teacher.metrics()
    finally:
        teacher.close()
    figures = {name: found.get(name) for name in ("requests", "retries", "p50_s", "p95_s", "rate_limit_events")}
    figures |= {"documents": prompts, "tokens": positions, "k": min(k, _CHAT_K), "hit_rate": 0.0}
    figures |= {"tokens_per_s": positions / seconds, "rows_from_store": 0, "store_bytes": 0, "asked_again": 0}
    return Measured(scenario.name, "pass", f"{prompts} chats, {positions} rows; it scores no documents", None, figures)


def drawn_documents(vocab_size: int, count: int, length: int) -> list[Tokens]:
    """``count`` different documents of ``length`` ids, the same every time."""
    generator = np.random.Generator(np.random.PCG64(11))
    return [generator.integers(0, vocab_size, size=length) for _ in range(count)]


def table(measured: Sequence[Measured]) -> list[str]:
    """The summary, a row a scenario, then what failed or was not run with what to type."""
    head = ("scenario", "requests", "tokens/s", "p50", "p95", "hits", "429s", "store", "verdict")
    rows = [head, *(_row(one) for one in measured)]
    wide = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(wide[0]), *(cell.rjust(width) for cell, width in zip(row[1:-1], wide[1:-1], strict=True))]
        lines.append("  " + "  ".join([*cells, row[-1]]).rstrip())
    for one in measured:
        lines += ["", f"  {TITLES[one.name]}: {one.said}"] if one.verdict != "pass" else []
        lines += [f"    next: {one.next}"] if one.next else []
    return lines


def _row(one: Measured) -> tuple[str, ...]:
    if not one.figures:
        return (TITLES[one.name], *("–",) * 7, one.verdict)
    found = one.figures

    def milliseconds(name: str) -> str:
        return "–" if found[name] is None else f"{found[name] * 1e3:.0f} ms"

    return (
        TITLES[one.name],
        str(found["requests"]),
        f"{found['tokens_per_s']:.0f}",
        milliseconds("p50_s"),
        milliseconds("p95_s"),
        f"{found['hit_rate']:.0%}",
        str(found["rate_limit_events"]),
        f"{found['store_bytes'] / 1e3:.1f} kB",
        one.verdict,
    )


def worst(measured: Sequence[Measured]) -> ExitCode:
    """1 where one failed, 3 where none failed and one was not run, else 0."""
    verdicts = {one.verdict for one in measured}
    return ExitCode.FAIL if "fail" in verdicts else ExitCode.UNKNOWN if "unknown" in verdicts else ExitCode.PASS


def check_folder(folder: Path | None) -> None:
    """Refuse a folder without a tokenizer before anything is asked."""
    if folder is not None:
        Tokenizer.open(folder)
