"""Continuations over HTTP: ids of what the server drew after the right prompt, or a refusal that says what is wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch

from latentforge.errors import FailedError, RefusedError
from latentforge.targets.continued import absorbed, contexts
from latentforge.teachers.continuing import Continuing
from latentforge.teachers.continuing_agreement import check_draws
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.fixture import FixtureTeacher
from latentforge.teachers.http.client import HttpClient
from latentforge.teachers.http.flow import Budget, FlowControl
from latentforge.teachers.http.openai import OpenAITeacher, served_identity

from .wire import VOCABULARY, answer, question

EVERY = torch.arange(VOCABULARY)
LOGITS = FixtureTeacher(VOCABULARY).logits(torch.stack([EVERY, EVERY], dim=1)) / 1.5
"""[V, V]: the served model looks at the last token alone, and is less sure of repeating it than the fixture is."""
ROWS = VOCABULARY + 3
EOS = 0
ASKED = Continuing(chunk=3, count=8, temperatures=(1.0, 0.5), eos_id=EOS, seed=7)
STRICT = {"model", "prompt", "n", "max_tokens", "temperature", "top_p", "seed", "logit_bias", "logprobs"} | {
    "return_tokens_as_token_ids"
}


class Server(BaseHTTPRequestHandler):
    """The fixture teacher as a server writes: with known probabilities, and the fault that was asked for."""

    fault = ""
    bodies: list[dict[str, Any]]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """The one model."""
        self._say({"data": [{"id": "m", "max_model_len": 32}]})

    def do_POST(self) -> None:
        """Rows of a prompt, or chunks after it."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "prompt_logprobs" in body or "echo" in body:
            self._say({"choices": [{"text": "x"}]} if self.fault == "no rows" else self._rows(body))
            return
        self.bodies.append(body)
        unknown = set(body) - STRICT if self.fault == "strict" else set()
        if unknown:
            self._say({"error": {"message": f"unknown fields {sorted(unknown)}"}}, 400)
        else:
            self._say(self._chunks(body))

    def _rows(self, body: dict[str, Any]) -> dict[str, Any]:
        # Where log-probabilities of what is generated are asked too, it is the row of the last token.
        last = "prompt_logprobs" in body and "logprobs" in body
        tokens = (*body["prompt"], 1) if last else tuple(body["prompt"])
        asked = question(tokens, body.get("prompt_logprobs", body.get("logprobs")), rows=ROWS, last_generated=last)
        return answer(asked, LOGITS[list(tokens[:-1])], "echo" if "echo" in body else "prompt_logprobs")

    def _chunks(self, body: dict[str, Any]) -> dict[str, Any]:
        fault, count, size = self.fault, body["n"], body["max_tokens"]
        generator = np.random.Generator(np.random.PCG64(body["seed"]))
        shares = torch.softmax(LOGITS.double() / body["temperature"], -1).numpy()
        choices = []
        for number in range(1 if fault == "one" else count):
            ids: list[int] = []
            last = body["prompt"][-2 if fault == "late" else -1]
            while len(ids) < size:
                share = shares[last]
                last = int(share.argmax()) if fault == "greedy" else int(generator.choice(len(share), p=share))
                ids.append(last)
                if last == EOS and "ignore_eos" not in body:
                    break
            if fault == "repeated" and choices:
                ids = choices[0]["ids"]
            elif fault == "short":
                ids = ids[:-1] if EOS not in ids else ids
            elif fault == "padding":
                ids[0] = VOCABULARY
            ended = ids[-1] == EOS and len(ids) < size
            choices.append({"index": number, "ids": ids, "finish_reason": "stop" if ended else "length"})
        prompt = [1, *body["prompt"]] if fault == "begins" else body["prompt"]
        return {
            "choices": [self._choice(choice, body, prompt) for choice in choices],
            "usage": {"prompt_tokens": len(prompt)},
        }

    def _choice(self, choice: dict[str, Any], body: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
        ids = choice.pop("ids")
        choice["text"] = "x" * len(ids)
        if body.get("return_token_ids") and self.fault != "text":
            choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        if "logprobs" in body:
            named = [f"token_id:{one}" for one in ids]
            choice["logprobs"] = {"tokens": ["x"] * len(ids) if self.fault == "text" else named}
        return choice

    def _say(self, value: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def teacher_with(
    fault: str = "", *, budget: Budget | None = None
) -> Iterator[tuple[OpenAITeacher, list[dict[str, Any]]]]:
    """The teacher behind a server with that fault, and what was sent to it to be continued."""
    bodies: list[dict[str, Any]] = []
    handler = type("Faulty", (Server,), {"fault": fault, "bodies": bodies})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    teacher = OpenAITeacher(
        HttpClient(f"http://127.0.0.1:{server.server_port}/v1", timeout=30.0),
        "m",
        identity=served_identity("m", revision=None, tokenizer_sha256="0" * 64),
        vocab_size=VOCABULARY,
        rows=ROWS,
        flow=FlowControl(4, attempts=1, budget=budget or Budget()),
    )
    try:
        yield teacher, bodies
    finally:
        teacher.close()
        server.shutdown()
        thread.join()
        server.server_close()


def rows_of() -> np.ndarray:
    """Two rows of five chunks; the first has a document's end in its second chunk, and padding behind it."""
    rows = np.random.Generator(np.random.PCG64(2)).integers(1, VOCABULARY, (2, 15))
    rows[0, 4:6] = EOS
    return rows


@pytest.mark.parametrize("fault", ["", "strict"])
def test_each_context_is_one_request_of_its_text_and_its_chunks_stand_at_its_place(fault: str) -> None:
    rows = rows_of()
    with teacher_with(fault) as (teacher, bodies):
        found = dict(teacher.continuations(list(rows), ASKED))
        agreement = check_draws(teacher, [(rows[number], found[number]) for number in found], ASKED)
        again = dict(teacher.continuations(list(rows), ASKED))
        asked = [body for body in bodies if body["max_tokens"] == ASKED.chunk]
        assert all(body["logit_bias"] == {str(id): -100 for id in range(VOCABULARY, ROWS)} for body in asked)
    assert agreement is not None
    assert agreement.unit == "deviations"
    given = contexts(rows, ASKED.chunk, EOS)
    prompts = sorted(tuple(body["prompt"]) for body in asked[: len(asked) // 2])
    text = [rows[0, [0, 1, 2, 3, 4, *range(6, 12)]], rows[1, :12]]
    ends = [[3, 8, 11], [3, 6, 9, 12]]
    wanted = [tuple(row[:end].tolist()) for row, all_ends in zip(text, ends, strict=True) for end in all_ends]
    assert prompts == sorted(wanted * 2), "two temperatures"
    assert len({body["seed"] for body in asked}) == len(asked) // 2, "a seed for each context and temperature"
    for number, drawn in found.items():
        for temperature, ids in drawn.items():
            assert (ids[~given[number]] == -1).all()
            assert (ids[given[number]] >= 0).all()
            ended = absorbed(ids, EOS), absorbed(again[number][temperature], EOS)
            assert np.array_equal(*ended), "the seeds are ours"


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        ("text", "collapsed", "as text"),
        ("one", "too-few", r"1 chunks were drawn, 2 were asked \(n\)"),
        ("short", "malformed", "1 tokens, 2 were asked"),
        ("padding", "wrong-ids", f"the tokenizer has {VOCABULARY} tokens"),
        ("begins", "wrong-ids", "the server read 3 tokens, 2 were sent"),
    ],
)
def test_a_server_that_gives_no_chunks_of_ids_is_refused_by_what_it_did(fault: str, kind: str, said: str) -> None:
    with teacher_with(fault) as (teacher, bodies), pytest.raises(TeacherFailure, match=said) as caught:
        list(teacher.continuations(list(rows_of()), ASKED))
    assert caught.value.kind == kind
    assert all(body["n"] == 2 for body in bodies), "a short question finds it, before anything is paid for"


@pytest.mark.parametrize("fault", ["late", "greedy", "repeated"])
def test_a_server_that_draws_from_something_else_is_found(fault: str) -> None:
    rows = np.random.Generator(np.random.PCG64(2)).integers(1, VOCABULARY, (3, 12))
    asked = Continuing(chunk=3, count=8, temperatures=(1.0,), eos_id=EOS, seed=7)
    with teacher_with(fault) as (teacher, _):
        found = dict(teacher.continuations(list(rows), asked))
        with pytest.raises(FailedError, match="asked another way"):
            check_draws(teacher, [(rows[number], found[number]) for number in found], asked)


def test_a_server_without_rows_is_continued_and_said_to_be_compared_with_nothing() -> None:
    rows = rows_of()
    with teacher_with("no rows") as (teacher, _):
        found = dict(teacher.continuations(list(rows), ASKED))
        assert len(found) == 2
        assert check_draws(teacher, [(rows[number], found[number]) for number in found], ASKED) is None


def test_a_row_that_is_longer_than_the_server_takes_is_refused_before_it_is_asked() -> None:
    with teacher_with() as (teacher, bodies), pytest.raises(RefusedError, match="more than the server's 32"):
        list(teacher.continuations([np.ones(36, np.int64)], ASKED))
    assert len(bodies) == 1


def test_a_budget_ends_it_and_whole_rows_were_given_before() -> None:
    with teacher_with(budget=Budget(requests=12)) as (teacher, _):
        given = teacher.continuations([*rows_of(), *rows_of()[::-1]], ASKED)
        found = []
        with pytest.raises(TeacherFailure, match="requests are spent"):
            found.extend(given)
    assert len(found) <= 1


def test_an_api_that_only_chats_does_not_continue_texts() -> None:
    client = HttpClient("http://127.0.0.1:9/v1")
    identity = served_identity("m", revision=None, tokenizer_sha256="0" * 64)
    teacher = OpenAITeacher(client, "m", identity=identity, vocab_size=VOCABULARY, chat_only=True)
    assert "sample" not in teacher.capabilities
    teacher.close()
