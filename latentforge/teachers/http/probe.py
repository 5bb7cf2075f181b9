"""What an OpenAI-compatible server can do, found by asking it: models, form of question, largest k, document length."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import numpy as np

from latentforge.contracts.finding import worse
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.http.client import HttpClient
from latentforge.teachers.http.flow import FlowControl
from latentforge.teachers.http.rows import Answer, Form, Question, parse_answer, request_body

_TRIED_K = (100, 50, 20, 10, 5, 1)
_PROBE_TOKENS = 8
_PROBE_K = 3
_AGREES = 0.25  # nats between a row of the prompt and the same row generated: rounding, not another position
_ATTEMPTS = 3
# A server that answers 200 with rows by text, or without rows, says more than one that does not know the field.
_NO_ROWS = ("collapsed", "no-logprobs", "malformed", "refused-request")
_EXPECTED = ("collapsed", "no-logprobs", "refused-request")


@dataclass(frozen=True)
class ServedModel:
    """One entry of ``/models``: its name, and the longest document where the server says it (vLLM: max_model_len)."""

    name: str
    max_tokens: int | None
    root: str | None


@dataclass(frozen=True)
class ServerFacts:
    """What was found: how documents are scored, ``max_k`` entries a row, documents of ``max_tokens`` (None: not said).

    ``proved_nats`` is how far a row of the prompt lay from the same row generated: the proof that positions align.
    ``damaged``: the answer to a form that is asked before this one was none at all, however often it was asked for.
    """

    model: str
    form: Form
    max_k: int
    max_tokens: int | None
    proved_nats: float
    damaged: TeacherFailure | None = None


def served_models(client: HttpClient) -> list[ServedModel]:
    """What ``GET /models`` lists. Raises TeacherFailure."""
    value = client.get("/models")
    listed = value.get("data") if isinstance(value, dict) else None
    if not isinstance(listed, list) or not all(isinstance(m, dict) and isinstance(m.get("id"), str) for m in listed):
        client.failure("malformed", "the list of models is not one", status=200)
    found = []
    if not all(model["id"].isprintable() for model in listed):
        client.failure("malformed", "the list of models has a name that cannot be shown", status=200)
    for model in listed:
        limit, root = model.get("max_model_len"), model.get("root")
        fits = type(limit) is int and limit > 1
        found.append(ServedModel(model["id"], limit if fits else None, root if isinstance(root, str) else None))
    return found


def find_model(client: HttpClient, wanted: str) -> ServedModel:
    """The wanted model of the server's list; TeacherFailure names those that it has."""
    models = served_models(client)
    found = next((model for model in models if model.name == wanted), None)
    if found is None:
        names = ", ".join(repr(model.name) for model in models[:8]) + ("…" if len(models) > 8 else "")
        client.failure("model-not-found", f"no model {wanted!r}; it has {names or 'none'}")
    return found


def ask(client: HttpClient, model: str, question: Question, form: Form) -> Answer:
    """One request: the rows of one document. Raises TeacherFailure."""
    value = client.post("/completions", request_body(model, question, form))
    with client.hiding():
        return parse_answer(value, question, form, url=client.url)


def probe(client: HttpClient, flow: FlowControl, model: str, *, vocab_size: int, rows: int) -> ServerFacts:
    """Ask a few short questions and say what the server can do. TeacherFailure where it cannot score documents.

    ``vocab_size`` tokens and ``rows`` ids of the model, as its tokenizer and configuration have them.
    """
    served = attempt(flow, lambda: find_model(client, model), 0)
    generator = np.random.Generator(np.random.PCG64(7))
    tokens = tuple(int(t) for t in generator.integers(0, vocab_size, size=_PROBE_TOKENS))
    question = Question(tokens, min(_PROBE_K, vocab_size), vocab_size, rows)
    form, answer, damaged = _form(client, flow, model, question)
    if answer.own_inside == len(tokens) - 1:
        client.failure("too-few", "the document's own token takes the place of one of the k most likely", status=200)
    return ServerFacts(
        model=model,
        form=form,
        max_k=_max_k(client, flow, model, question, form),
        max_tokens=served.max_tokens,
        proved_nats=_prove_positions(client, flow, model, question, form, answer),
        damaged=damaged,
    )


def _form(
    client: HttpClient, flow: FlowControl, model: str, question: Question
) -> tuple[Form, Answer, TeacherFailure | None]:
    """The first form of question that gives rows, and what was damaged on the way; else the failure that tells most.

    A damaged answer is asked for again, as anywhere; where it stays so the next form is asked, and the log says why.
    """
    failures: list[TeacherFailure] = []
    for form in get_args(Form):
        try:
            found = tried(flow, partial(ask, client, model, question, form), question.charged, _EXPECTED)
        except TeacherFailure as failure:
            if failure.kind != "malformed":
                raise
            found = failure
        if not isinstance(found, TeacherFailure):
            damaged = next((one for one in failures if one.kind == "malformed"), None)
            if damaged is not None:
                flow.tell(f"rows are asked for with {form}, since the first form was answered damaged: {damaged}")
            return form, found, damaged
        failures.append(found)
    raise min(failures, key=lambda failure: _NO_ROWS.index(failure.kind))


def _prove_positions(
    client: HttpClient, flow: FlowControl, model: str, question: Question, form: Form, answer: Answer
) -> float:
    """Ask for the last row a second time, as the row of a generated token: it cannot stand at another position."""
    other = attempt(flow, lambda: ask(client, model, replace(question, last_generated=True), form), question.charged)
    worst = 0.0
    ids, logprobs = answer.targets.ids[-1], answer.targets.logprobs[-1]
    again = dict(zip(other.targets.ids[-1].tolist(), other.targets.logprobs[-1].tolist(), strict=True))
    floor = min(again.values())
    for number, logprob in zip(ids.tolist(), logprobs.tolist(), strict=True):
        # One that is not among them has at most the log-probability of their last.
        worst = worse(worst, abs(logprob - again[number]) if number in again else logprob - floor)
    if not worst <= _AGREES:
        client.failure(
            "shifted",
            f"the row of a prompt's last token differs by {worst:.3g} nats from the generated one",
            status=200,
        )
    return worst


def _max_k(client: HttpClient, flow: FlowControl, model: str, question: Question, form: Form) -> int:
    """The largest k that the server takes, at most the number of tokens."""
    short = replace(question, tokens=question.tokens[:2])

    def takes(k: int) -> tuple[bool, int | None]:
        asked = replace(short, k=k)
        found = tried(flow, lambda: ask(client, model, asked, form), asked.charged, ("too-few", "refused-request"))
        if not isinstance(found, TeacherFailure):
            return True, None
        if found.kind == "too-few":
            return False, _number(r"has (\d+) entries", found)
        return False, _number(r"max[a-z ]*(?:allowed|of|is)?:? *(\d+)", found)

    most = question.vocab_size
    # One more than there are ids is refused by a server with a bound of its own, which it names; others are asked less.
    _, named = takes(question.rows + 1)
    if named and takes(min(named, most, _TRIED_K[0]))[0]:
        return min(named, most)
    for k in _TRIED_K:
        if k <= most and takes(k)[0]:
            return k
    raise TeacherFailure("too-few", "not one log-probability a position is given", url=client.url, status=200)


def _number(pattern: str, failure: TeacherFailure) -> int | None:
    found = re.search(pattern, str(failure), re.I)
    return int(found.group(1)) if found else None


def tried(flow: FlowControl, call: Callable[[], Any], tokens: int, expected: tuple[str, ...]) -> Any:
    """The answer, or a failure of a kind that is an answer too: the server was asked what it may not be able to do."""

    def once() -> Any:
        try:
            return call()
        except TeacherFailure as failure:
            if failure.kind in expected:
                return failure
            raise

    return attempt(flow, once, tokens)


def attempt(flow: FlowControl, call: Callable[[], Any], tokens: int = 0) -> Any:
    """One of the short questions before the first document: tried again where a failure may pass, less often."""
    return flow.call(lambda _k: call(), tokens=tokens, attempts=_ATTEMPTS)
