"""What is not answered with a text: each bad input by its field, the key, foreign pages; nothing inside is shown."""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from latentforge.serve.asking import CompletionAsk, parse
from latentforge.serve.refusing import Refusal

from .conftest import KEY, Running

BEARER = {"Authorization": f"Bearer {KEY}"}
INSIDE = ("Traceback", ".py", "latentforge/", "site-packages", "Error(", "0x7f")


def refused(answer: httpx2.Response, status: int, field: str | None) -> str:
    """The message of an answer that says no, in OpenAI's form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == field
    assert error["message"]
    assert not [word for word in INSIDE if word in answer.text]
    return str(error["message"])


COMPLETION = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 10**3000}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [320]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [0]}, "prompt"),
    ({"prompt": [2**70]}, "prompt"),
    ({"prompt": "x " * 200}, "prompt"),
    ({"prompt": ["x"] * 5}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"n": 5}, "n"),
    ({"n": 0}, "n"),
    ({"n": 2**70}, "n"),
    ({"best_of": 0}, "best_of"),
    ({"n": 2, "best_of": 1}, "best_of"),
    ({"best_of": 5}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"best_of": 2, "temperature": 0, "method": "tokens"}, "best_of"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 25}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": 1e-46}, "temperature"),
    ({"temperature": 1e-320, "method": "vote"}, "temperature"),
    ({"temperature": 1e-320, "method": "exact"}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"temperature": 1.5, "method": "head"}, "temperature"),
    ({"temperature": 0, "method": "head"}, "temperature"),
    ({"temperature": 0.4, "method": "vote"}, "temperature"),
    ({"temperature": 0.01, "method": "exact", "draws": 9}, "draws"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": 0.5, "method": "head"}, "top_p"),
    ({"top_k": 0}, "top_k"),
    ({"top_k": 321}, "top_k"),
    ({"draws": 31}, "draws"),
    ({"method": "beam"}, "method"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 0.5}, "seed"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop": 3}, "stop"),
    ({"logprobs": 3}, "logprobs"),
    ({"logprobs": 0, "stream": True}, "logprobs"),
    ({"suffix": "b"}, "suffix"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"deadline": 0}, "deadline"),
    ({"deadline": 61}, "deadline"),
    ({"user": 5}, "user"),
    ({"messages": []}, "messages"),
    ({"\ud800": 1}, "\\ud800"),
]


@pytest.mark.parametrize(("words", "field"), COMPLETION, ids=lambda value: str(value)[:40].encode("ascii", "replace"))
def test_a_bad_field_of_a_completion_is_named(strict: Running, words: dict[str, Any], field: str) -> None:
    refused(strict.post("/v1/completions", {"model": "tiny", "prompt": "def", **words}, **BEARER), 400, field)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ({"prompt": ["a"]}, "prompt"),
        ({"max_new_tokens": 25}, "max_new_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"top_k": 10**30}, "top_k"),
        ({"seed": 2**70}, "seed"),
        ({"temperature": None}, "temperature"),
    ],
)
def test_a_bad_field_of_generate_is_named(strict: Running, words: dict[str, Any], field: str) -> None:
    refused(strict.post("/generate", {"prompt": "def", **words}, **BEARER), 400, field)


def test_what_is_missing_is_named(strict: Running) -> None:
    assert "is missing" in refused(strict.post("/v1/completions", {"prompt": "a"}, **BEARER), 400, "model")
    assert "is missing" in refused(strict.post("/generate", {}, **BEARER), 400, "prompt")


def test_a_field_by_a_near_name_is_pointed_at(strict: Running) -> None:
    assert "is it max_tokens?" in refused(
        strict.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_token": 3}, **BEARER), 400, "max_token"
    )


def test_a_refusal_speaks_of_json_and_not_of_what_reads_it(strict: Running) -> None:
    for words in ({"suffix": "b"}, {"logit_bias": {"5": 1}}):
        answer = strict.post("/v1/completions", {"model": "tiny", "prompt": "a", **words}, **BEARER)
        assert not re.search("None|dictionary|validat", refused(answer, 400, next(iter(words))))


def test_a_body_in_another_encoding_or_with_an_endless_number_is_told_so(strict: Running) -> None:
    for body in (
        '{"prompt": "é"}'.encode("latin-1"),
        '{"prompt": "a"}'.encode("utf-16"),
        b'{"prompt": "\xed\xa0\x80"}',
    ):
        assert "not UTF-8" in refused(strict.post("/generate", body, **BEARER), 400, None)
    # Also in UTF-16 or UTF-32 without its mark, which are UTF-8 by their bytes.
    assert "not JSON" in refused(strict.post("/generate", '{"prompt": "a"}'.encode("utf-16-le"), **BEARER), 400, None)
    with pytest.raises(Refusal, match="more than 4300 digits"):
        parse(CompletionAsk, b'{"prompt": "a", "seed": ' + b"9" * 4301 + b"}")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b'"a"', b"null", b"\xff\xfe", b"[" * 4000],
    ids=lambda body: repr(body[:12]),
)
def test_a_body_that_is_no_json_object_is_refused(strict: Running, body: bytes) -> None:
    refused(strict.post("/generate", body, **BEARER), 400, None)


def test_a_name_that_is_there_twice_is_refused(strict: Running) -> None:
    twice = b'{"prompt": "a", "max_new_tokens": 1, "prompt": "b"}'
    assert "twice" in refused(strict.post("/generate", twice, **BEARER), 400, "prompt")


def test_a_body_of_any_depth_is_refused_by_its_field_or_its_depth() -> None:
    for depth in range(1, sys.getrecursionlimit() + 100):
        nest = b"[" * depth + b"]" * depth
        for body in (b'"prompt": [1, ' + nest + b"]", b'"prompt": "a", "user": ' + nest):
            with pytest.raises(Refusal):
                parse(CompletionAsk, b'{"model": "tiny", ' + body + b"}")


def answered(server: Running, status: str) -> float:
    """Requests that were answered so."""
    families = text_string_to_metric_families(server.get("/metrics", **BEARER).text)
    samples = [one for family in families for one in family.samples if one.name == "latentforge_requests_total"]
    return sum(one.value for one in samples if one.labels["status"] == status)


def test_a_client_that_leaves_before_its_body_is_there_is_no_error(strict: Running) -> None:
    before = answered(strict, "499")
    head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
    address = httpx2.URL(strict.url)
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(f"{head}Authorization: Bearer {KEY}\r\n\r\n{{".encode())
    while answered(strict, "499") == before:
        assert answered(strict, "500") == 0


def test_a_body_beyond_the_limit_is_413_and_another_type_415(strict: Running) -> None:
    body = json.dumps({"prompt": "x" * 5000}).encode()
    refused(strict.post("/generate", body, **BEARER), 413, None)

    def parts() -> Any:
        yield from [body[at : at + 100] for at in range(0, len(body), 100)]

    url, json_type = strict.url + "/generate", {"Content-Type": "application/json"}
    refused(httpx2.post(url, content=parts(), headers={**BEARER, **json_type}), 413, None)  # its length is not said
    refused(httpx2.post(url, content=b"x" * 200_000, headers={**BEARER, **json_type}), 413, None)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        refused(httpx2.post(url, content=b"{}", headers={**BEARER, "Content-Type": kind}), 415, "Content-Type")
    packed = {**BEARER, **json_type, "Content-Encoding": "gzip"}
    refused(httpx2.post(url, content=b"{}", headers=packed), 415, "Content-Encoding")


def test_without_the_key_there_is_nothing_but_health_and_the_description(strict: Running) -> None:
    wrong: list[dict[str, str]] = [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": "Bearer"},
    ]
    for headers in wrong:
        for path in ("/v1/models", "/metrics", "/", "/docs/", "/docs/../metrics", "/nothing"):
            answer = strict.get(path, **headers)
            assert "key" in refused(answer, 401, "Authorization")
            assert answer.headers["www-authenticate"] == "Bearer"
        refused(strict.post("/v1/completions", {"model": "tiny", "prompt": "a"}, **headers), 401, "Authorization")
    assert strict.get("/health").json() == {"status": "alive"}
    assert strict.get("/ready").json() == {"status": "ready"}
    description = strict.get("/openapi.json").json()  # for a browser, which cannot send the key before it has the page
    assert strict.get("/docs").status_code == strict.get("/docs/swagger-ui.css").status_code == 200
    assert description["components"]["securitySchemes"][next(iter(description["security"][0]))]["scheme"] == "bearer"
    assert strict.get("/v1/models", **BEARER).status_code == 200
    assert strict.get("/v1/models", Authorization=f"bearer {KEY}").status_code == 200


def test_a_page_of_another_origin_gets_no_header(strict: Running) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    for origin, allowed in (("https://pages.example", True), ("https://evil.example", False), ("null", False)):
        before = httpx2.options(strict.url + "/v1/completions", headers={"Origin": origin, **ask})
        answer = strict.post("/generate", {"prompt": "a"}, Origin=origin, **BEARER)
        without_key = strict.post("/generate", {"prompt": "a"}, Origin=origin)
        assert before.status_code == (200 if allowed else 400)
        for one in (before, answer, without_key):
            assert one.headers.get("access-control-allow-origin") == (origin if allowed else None)
            assert "access-control-allow-credentials" not in one.headers


def test_a_foreign_name_of_this_machine_is_refused_where_there_is_no_key(server: Running) -> None:
    refused(server.get("/v1/models", Host="evil.example"), 421, "Host")
    refused(server.get("/v1/models", Host="localhost.evil.example:80"), 421, "Host")
    for host in ("localhost", "127.0.0.1:1", "[::1]:8000"):
        assert server.get("/v1/models", Host=host).status_code == 200


def test_a_path_or_a_method_that_there_is_not_is_refused_in_the_same_form(strict: Running) -> None:
    refused(strict.get("/v1/chat/completions", **BEARER), 404, None)
    refused(strict.get("/generate", **BEARER), 405, None)
    paths = (
        "/",
        "/v1/completions",
        "/v1/models",
        "/generate",
        "/health",
        "/ready",
        "/metrics",
        "/docs",
        "/openapi.json",
    )
    for path in paths:
        for method in ("OPTIONS", "PUT", "DELETE", "TRACE", "FOO"):
            refused(strict.client.request(method, path, headers=BEARER), 405, None)
        assert strict.client.request("HEAD", path, headers=BEARER).status_code in (200, 405)
    tricks = ("/v1//models", "/health%00", "/metrics;a")
    for path in (*tricks, *(path + "/" for path in paths[1:])):
        answer = strict.get(path, **BEARER)
        assert refused(answer, 404, "model" if path == "/v1/models/" else None)


def test_a_deadline_that_passes_is_said(strict: Running) -> None:
    answer = strict.post("/generate", {"prompt": "a", "deadline": 1e-9}, **BEARER)
    assert "deadline" in refused(answer, 504, "deadline")


def test_draws_that_are_not_enough_are_said(strict: Running) -> None:
    body = {"prompt": "a", "method": "exact", "temperature": 0.05, "draws": 25}
    assert "none of 25 draws was accepted" in refused(strict.post("/generate", body, **BEARER), 422, "draws")
    stream = strict.post("/generate", {**body, "stream": True}, **BEARER).text.split("\n\n")
    assert json.loads(stream[-3].removeprefix("data: "))["error"]["code"] == "not_settled"
    assert stream[-2:] == ["data: [DONE]", ""]


def test_bytes_that_are_no_http_harm_nobody(strict: Running) -> None:
    address = httpx2.URL(strict.url)
    heads = (b"GET\r\n\r\n", b"POST / HTTP/9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n")
    for sent in (b"\x16\x03\x01\x02", b"A" * 100_000, *heads):
        with socket.create_connection((address.host, address.port)) as connection:
            connection.settimeout(60)
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            try:
                answer = connection.recv(65536)
            except ConnectionResetError:
                answer = b""
        assert not answer or answer.split()[1].startswith(b"4")
    assert strict.get("/health").status_code == 200


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, -(2**63) - 1, 2**70, 10**40, 0, -1, -0.0, 5e-324])
    | st.floats()
    | st.text(max_size=20)
    | st.text(st.characters(), max_size=5)
    | st.sampled_from(["\0", "a\0b", "\ud800", "\udfff\ud800", "\r\nX-A: b", "<|endoftext|>", "\ufeff"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
NAMES = [
    *("prompt", "max_tokens", "max_new_tokens", "temperature", "top_p", "top_k", "n", "best_of", "stream", "stop"),
    *("stream_options", "seed", "echo", "logprobs", "suffix", "presence_penalty", "frequency_penalty", "logit_bias"),
    *("user", "method", "draws", "deadline", "model"),
]
LIKELY = st.sampled_from(["head", "exact", "vote", "tokens", "tiny", {"include_usage": True}, [1, 2], [[3]], 0.5, 1, 2])
FIELDS = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), VALUES | LIKELY, max_size=5)
PROMPTS = (
    st.lists(st.integers(-1, 330) | st.booleans() | st.just(2**70), max_size=6)
    | st.lists(st.lists(st.integers(0, 330) | st.booleans(), max_size=3), max_size=3)
    | st.lists(st.text(max_size=4) | st.integers(0, 9), max_size=3)
    | st.integers(1, 10_000).map(lambda count: [[5]] * count)
    | st.integers(1, 10_000).map(lambda count: ["a"] * count)
)
# Fields that mean something together, mostly of the right kind.
TOGETHER = st.fixed_dictionaries(
    {"prompt": PROMPTS | st.sampled_from(["def", ["a", "b"], [5, 6]])},
    optional={
        "max_tokens": st.integers(0, 26),
        "temperature": st.sampled_from([0, -0.0, 0.5, 1, 1.5, 2]),
        "top_p": st.sampled_from([0.5, 1, 1.0]),
        "n": st.integers(0, 5),
        "best_of": st.integers(0, 5),
        "stream": st.booleans(),
        "stream_options": st.sampled_from([{}, None, {"include_usage": True}, {"include_obfuscation": False}]),
        "stop": st.sampled_from(["e", ["a", "b"], [], None, "\0"]),
        "seed": st.sampled_from([0, -1, 2**63 - 1, 2**63]),
        "echo": st.booleans(),
        "logprobs": st.integers(0, 1),
        "suffix": st.sampled_from([None, ""]),
        "method": st.sampled_from(["head", "vote", "exact", "tokens"]),
    },
).map(lambda words: {"model": "tiny", **words})
# What a JSON library would not write: each value as it stands in the body.
LITERALS = st.sampled_from(
    [
        *("1e400", "-1e400", "-0.0", "1E-400", "1e-46", "NaN", "Infinity", "1.0", "01", "+1", "0x1", str(2**70)),
        *(
            "9" * 4000,
            "[" * 900 + "]" * 900,
            '{"a":' * 300 + "1" + "}" * 300,
            r'"\u0000"',
            r'"\ud800"',
            r'"\udc00\ud800"',
        ),
        *('"\xff"', '"\0"', "[[5], [true]]", "[1.0]", "[5, 1e2]", '["a", ["b"]]', "{}", "[]", "[[]]", "tru", "", '"'),
    ]
)
RAW = st.tuples(
    st.sampled_from(['"model": "tiny", "prompt": "def", ', '"model": "tiny", ', "", '"prompt": "def", ']),
    st.lists(st.tuples(st.sampled_from(NAMES), LITERALS), min_size=1, max_size=3),
).map(
    lambda parts: ("{" + parts[0] + ", ".join(f'"{name}": {value}' for name, value in parts[1]) + "}").encode("latin-1")
)
BODIES = (
    st.binary(max_size=40)
    | FIELDS.map(lambda words: {"prompt": "def", **words})
    | FIELDS.map(lambda words: {"model": "tiny", "prompt": "def", **words})
    | VALUES
    | TOGETHER
    | RAW
)


def is_answered(client: httpx2.Client, path: str, body: Any) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(path, content=content)
    shown = [word for word in INSIDE if word in answer.text and word.encode() not in content]
    assert not shown, answer.text
    if answer.status_code == 200:
        return
    assert 400 <= answer.status_code < 500 or (answer.status_code == 504 and b"deadline" in content), answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


@pytest.fixture(scope="module")
def client(strict: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=strict.url, headers={**BEARER, "Content-Type": "application/json"}, timeout=120) as one:
        yield one


@settings(max_examples=250)
@given(path=st.sampled_from(["/v1/completions", "/generate"]), body=BODIES)
def test_no_body_is_an_error_of_the_server(client: httpx2.Client, path: str, body: Any) -> None:
    is_answered(client, path, body)


@pytest.mark.soak
@settings(max_examples=10_000)
@given(path=st.sampled_from(["/v1/completions", "/generate"]), body=BODIES)
def test_soak_no_body_is_an_error_of_the_server(client: httpx2.Client, path: str, body: Any) -> None:
    is_answered(client, path, body)
