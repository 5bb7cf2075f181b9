"""OpenAI's completions by its stock client, and our own schema, from a real server of a real student."""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest

from latentforge.serve.answers import Completion, Served
from latentforge.serve.app import Service, build
from latentforge.serve.asking import CompletionAsk, parse
from latentforge.serve.engine import Engine
from latentforge.serve.limits import Limits
from latentforge.serve.measures import Measures
from latentforge.serve.preparing import completion_choices
from latentforge.serve.texts import Conversation
from latentforge.students.latent.generate import generate
from latentforge.students.latent.requests import Request, Sampling
from latentforge.students.latent.scoring import best_of, seed_of
from latentforge.writers.opening import Writer, open_writer

from ..latent_folders import Folders
from .conftest import Gated, Running

PROMPT = "def main(argv):\n    "


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def writer(folders: Folders) -> Writer:
    return open_writer(folders.latent)


def ids(writer: Writer, text: str) -> tuple[int, ...]:
    return tuple(writer.tokenizer.backend.encode(text, add_special_tokens=False).ids)


def text(writer: Writer, tokens: Any) -> str:
    return str(writer.tokenizer.backend.decode(list(tokens), skip_special_tokens=True))


def test_the_stock_client_gets_the_text_that_the_model_writes(client: openai.OpenAI, writer: Writer) -> None:
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, seed=5)
    (wanted,) = generate(writer.model, [Request(ids(writer, PROMPT), 30, 5)])
    assert found.choices[0].text == text(writer, wanted.tokens)
    assert found.choices[0].finish_reason == {"eos": "stop", "length": "length"}[wanted.finish]
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(wanted.prompt), len(wanted.tokens))
    assert found.system_fingerprint is not None
    assert writer.digests["student"][:8] in found.system_fingerprint


def test_a_stream_of_the_stock_client_is_the_whole_answer_in_parts(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": [PROMPT, "import os"], "max_tokens": 21, "seed": 5, "n": 2}
    whole = client.completions.create(**asked)
    parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len({part.id for part in parts}) == 1
    for index, choice in enumerate(whole.choices):
        own = [part.choices[0] for part in parts if part.choices and part.choices[0].index == index]
        assert "".join(part.text for part in own) == choice.text
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        assert len(own) > 3
    assert parts[-1].usage == whole.usage
    assert all(part.usage is None for part in parts[:-1])


def test_a_stream_ends_with_one_done(server: Running) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 9, "stream": True}
    for path, asked in (("/v1/completions", body), ("/generate", {"prompt": PROMPT, "stream": True})):
        answer = server.post(path, asked)
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert answer.text.count("[DONE]") == 1
        assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_the_models_are_the_one_that_is_served(client: openai.OpenAI, server: Running) -> None:
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "latentforge"
    for call in (lambda: client.models.retrieve("other"), lambda: client.completions.create(model="x", prompt="a")):
        with pytest.raises(openai.NotFoundError) as error:
            call()
        assert error.value.param == "model"
    assert server.get("/v1/models").json()["data"][0]["digests"] == server.said[1]["digests"]


def test_prompts_are_texts_or_tokens_and_each_is_answered_as_by_itself(server: Running, writer: Writer) -> None:
    texts = [PROMPT, "import os", "x"]
    together = server.completion(prompt=texts, seed=8, max_tokens=15)["choices"]
    tokens = server.completion(prompt=[list(ids(writer, one)) for one in texts], seed=8, max_tokens=15)["choices"]
    alone = [server.completion(prompt=one, seed=8, max_tokens=15)["choices"][0]["text"] for one in texts]
    assert [one["text"] for one in together] == [one["text"] for one in tokens] == alone
    one = server.completion(prompt=list(ids(writer, "import os")), seed=8, max_tokens=15)["choices"]
    assert [choice["text"] for choice in one] == alone[1:2]


def test_a_seeded_request_is_the_same_alone_and_among_many(server: Running) -> None:
    def ask(seed: int) -> str:
        found = server.completion(prompt=PROMPT + "x" * (seed % 5), seed=seed, max_tokens=24)
        return str(found["choices"][0]["text"])

    alone = [ask(seed) for seed in range(8)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, list(range(8)) * 3)) == alone * 3
    assert len(set(alone)) > 6


def test_a_prompt_begins_as_the_documents_of_its_tokenizer_do(writer: Writer) -> None:
    asked = parse(CompletionAsk, json.dumps({"model": "tiny", "prompt": PROMPT}).encode())
    after_bos = replace(writer, before=(7,))
    (choice,) = completion_choices(asked, after_bos, Limits())
    assert choice.request.prompt == (7, *ids(writer, PROMPT))
    assert choice.prompt == PROMPT


def test_no_seed_is_another_text_each_time(server: Running) -> None:
    found = [server.post("/generate", {"prompt": PROMPT, "max_new_tokens": 24}).json() for _ in range(3)]
    assert len({one["seed"] for one in found}) == len({one["text"] for one in found}) == 3
    again = server.post("/generate", {"prompt": PROMPT, "max_new_tokens": 24, "seed": found[0]["seed"]}).json()
    assert again["text"] == found[0]["text"]


def test_equal_prompts_without_a_seed_get_different_texts(server: Running) -> None:
    found = server.completion(prompt=[PROMPT] * 4, max_tokens=24)["choices"]
    assert len({one["text"] for one in found}) == 4
    same = server.completion(prompt=[PROMPT] * 2, max_tokens=24, seed=1)["choices"]
    assert same[0]["text"] == same[1]["text"]


def test_a_stop_string_ends_the_text_before_it(server: Running) -> None:
    asked = {"seed": 3, "max_tokens": 40}
    whole = server.completion(**asked)["choices"][0]["text"]
    stop = whole[9:11]
    found = server.completion(**asked, stop=["\0", stop])
    assert found["choices"][0] == {
        "text": whole[: whole.index(stop)],
        "index": 0,
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert found["usage"]["completion_tokens"] < 40
    stream = server.post(
        "/v1/completions", {"model": "tiny", "prompt": "def main(", **asked, "stop": stop, "stream": True}
    )
    parts = [json.loads(line[6:]) for line in stream.text.split("\n\n")[:-2]]
    assert "".join(part["choices"][0]["text"] for part in parts) == whole[: whole.index(stop)]


def test_echo_begins_with_the_prompt_as_it_was_given(server: Running) -> None:
    prompt = "  été <|endoftext|>\n"
    plain = server.completion(prompt=prompt, seed=1)["choices"][0]["text"]
    assert server.completion(prompt=prompt, seed=1, echo=True)["choices"][0]["text"] == prompt + plain


def test_best_of_answers_with_the_likeliest_and_counts_all(server: Running, writer: Writer) -> None:
    found = server.completion(prompt=PROMPT, seed=4, max_tokens=12, n=2, best_of=5, logprobs=0)
    (best,) = best_of(writer.model, [Request(ids(writer, PROMPT), 12, 4)], 5)
    assert found["choices"][0]["text"] == text(writer, best.chosen.generated.tokens)
    means = [sum(row) / len(row) for row in (one["logprobs"]["token_logprobs"] for one in found["choices"])]
    assert means == pytest.approx(sorted(best.scores, reverse=True)[:2], abs=1e-4)
    every = generate(writer.model, [Request(ids(writer, PROMPT), 12, seed_of(4, number)) for number in range(5)])
    assert found["usage"]["completion_tokens"] == sum(len(one.tokens) for one in every)


def test_logprobs_are_of_each_token_and_their_texts_are_the_answer(server: Running, writer: Writer) -> None:
    (choice,) = server.completion(prompt=PROMPT, seed=4, max_tokens=12, logprobs=0, echo=True)["choices"]
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == choice["text"]
    assert [choice["text"][at:][: len(one)] for at, one in zip(told["text_offset"], told["tokens"], strict=True)] == (
        told["tokens"]
    )
    (wanted,) = generate(writer.model, [Request(ids(writer, PROMPT), 12, 4)])
    import torch

    (scores,) = writer.model.score([torch.tensor(wanted.prompt + wanted.tokens)])
    assert told["token_logprobs"] == pytest.approx(scores.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("words", "sampling"),
    [
        ({"method": "vote", "temperature": 0.5, "draws": 30}, Sampling("vote", 0.5, 30)),
        ({"method": "head", "temperature": 0.7}, Sampling("head", 0.7)),
        ({"temperature": 0, "draws": 20}, Sampling("vote", 0.0, 20)),
        ({"top_p": 0.8}, Sampling("tokens", 1.0, top_p=0.8)),
        ({"temperature": 1.5, "top_k": 5}, Sampling("tokens", 1.5, top_k=5)),
    ],
)
def test_each_way_of_sampling_is_the_library_s(
    server: Running, writer: Writer, words: dict[str, Any], sampling: Sampling
) -> None:
    (wanted,) = generate(writer.model, [Request(ids(writer, PROMPT), 14, 2, sampling)])
    found = server.post("/generate", {"prompt": PROMPT, "max_new_tokens": 14, "seed": 2, **words}).json()
    assert (found["tokens"], found["method"]) == (list(wanted.tokens), sampling.method)
    assert (found["chunks"], found["draws"]) == (wanted.steps, wanted.draws)
    assert found["text"] == text(writer, wanted.tokens)
    completion = server.completion(prompt=PROMPT, max_tokens=14, seed=2, **words)
    assert completion["choices"][0]["text"] == found["text"]


def test_the_first_event_is_sent_before_the_second_chunk_is_drawn(writer: Writer) -> None:
    model = Gated()

    async def ask() -> None:
        ready, loop, limits, measures = asyncio.Event(), asyncio.get_running_loop(), Limits(), Measures()
        opened = replace(writer, model=model)  # type: ignore[arg-type]
        engine = Engine(lambda: opened, limits, measures, loop.call_soon_threadsafe, ready.set)
        engine.start()
        await ready.wait()
        app = build(Service(engine, limits, measures, "tiny"), key=None, hosts=None, origins=[])
        body = {"prompt": [1, 2], "max_new_tokens": 6, "seed": 1, "stream": True}
        inbox, sent = asyncio.Queue[Any](), asyncio.Queue[Any]()
        inbox.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})
        scope = {"type": "http", "method": "POST", "path": "/generate", "query_string": b"", "root_path": ""}
        scope |= {"headers": [(b"content-type", b"application/json")]}
        asking = asyncio.create_task(app(scope, inbox.get, sent.put))
        try:
            model.let.release()
            assert (await sent.get())["status"] == 200
            assert json.loads((await sent.get())["body"].removeprefix(b"data: "))["tokens"] == [2, 2]
            assert len(model.rows) == 1
            model.let.release(2)
            await asking
        finally:
            engine.stop(0)
            model.let.release(1000)
            await asyncio.to_thread(engine.ended.wait)

    asyncio.run(ask())


@pytest.mark.soak
def test_soak_the_first_event_is_there_before_a_third_of_the_time(server: Running) -> None:
    longest = 0.0
    for seed in range(20):
        asked = {"prompt": PROMPT, "max_new_tokens": 256, "seed": seed, "stream": True}
        began = time.monotonic()
        with httpx2.stream("POST", server.url + "/generate", json=asked) as answer:
            lines = answer.iter_lines()
            next(lines)
            first = time.monotonic() - began
            events = [line for line in lines if line]
        if len(events) > 60:  # not one whose text ended early
            longest = first / (time.monotonic() - began)
            break
    assert 0 < longest < 0.3


def test_a_client_that_leaves_ends_the_work_on_its_text(server: Running) -> None:
    left = server.figures().get("latentforge_texts_total", 0)
    for stream in (True, False):
        began = server.figures()["latentforge_step_texts_count"]
        # A thousand draws a chunk: however busy the machine is, it is not over before its client has left.
        asked = {"prompt": PROMPT, "max_new_tokens": 2048, "method": "vote", "draws": 1000, "stream": stream}
        body = json.dumps(asked).encode()
        head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}"
        address = httpx2.URL(server.url)
        with socket.create_connection((address.host, address.port)) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            server.until(lambda found, began=began: found["latentforge_step_texts_count"] > began)
        over = server.until(lambda found: found["latentforge_batch_size"] == 0)
        assert over["latentforge_step_texts_count"] - began < 500
    assert over["latentforge_texts_total"] == left + 2


def test_the_figures_move(server: Running) -> None:
    before = server.figures()
    produced = sum(server.completion(max_tokens=10, seed=seed)["usage"]["completion_tokens"] for seed in range(3))
    moved = {name: value - before.get(name, 0) for name, value in server.figures().items()}
    assert moved["latentforge_tokens_total"] == produced > 3
    assert moved["latentforge_first_chunk_seconds_count"] == 3
    assert moved["latentforge_chunks_total"] == moved["latentforge_chunk_seconds_count"] + 3
    assert moved["latentforge_texts_total"] == 3
    answer = server.get("/metrics").text
    assert 'latentforge_requests_total{path="/v1/completions",status="200"}' in answer
    assert 'latentforge_first_chunk_seconds_bucket{le="0.05"}' in answer


def test_a_prompt_is_counted_once_however_many_texts_follow_it(server: Running) -> None:
    before = server.figures()
    usage = server.completion(prompt=[PROMPT, "class"], n=3, max_tokens=2)["usage"]
    moved = server.figures()["latentforge_prompt_tokens_total"] - before["latentforge_prompt_tokens_total"]
    alone = [server.completion(prompt=one, max_tokens=2)["usage"]["prompt_tokens"] for one in (PROMPT, "class")]
    assert moved == usage["prompt_tokens"] == sum(alone)


def test_a_rate_is_of_the_last_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, measures = [100.0], Measures()
    monkeypatch.setattr("latentforge.serve.measures.time", SimpleNamespace(monotonic=lambda: now[0]))
    measures.produced(30)
    now[0] = 109.0
    measures.produced(10)
    assert measures.rate() == 4
    now[0] = 111.0
    assert measures.rate() == 1


def test_a_field_at_its_default_is_no_other_request(server: Running) -> None:
    words: dict[str, Any] = {"presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "top_p": 1.0, "n": 1}
    words |= {"suffix": "", "stop": [], "best_of": 1, "user": "a", "temperature": 1}
    same = [server.completion(seed=3, **given)["choices"] for given in ({}, words)]
    assert same[0] == same[1]


def test_the_description_names_each_field(server: Running) -> None:
    found = server.get("/openapi.json").json()
    assert {"CompletionAsk", "GenerateAsk", "StreamOptions"} <= set(found["components"]["schemas"])
    assert "best_of" in found["components"]["schemas"]["CompletionAsk"]["properties"]
    assert not any("ValidationError" in name for name in found["components"]["schemas"])
    assert "ValidationError" not in json.dumps(found["paths"])


def test_the_page_that_describes_them_and_all_that_it_refers_to_come_from_the_server(server: Running) -> None:
    page = server.get("/docs")
    assert "://" not in page.text
    assert "default-src 'self';" in page.headers["content-security-policy"]
    referred = re.findall(r"""(?:src|href)="([^"]*)"|url: '([^']*)'""", page.text)
    paths = [one or other for one, other in referred]
    assert [path.rpartition(".")[2] for path in paths] == ["css", "png", "js", "json"]
    for path in paths:
        answer = server.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].partition(";")[0].rpartition("/")[2] in (
            "css",
            "png",
            "javascript",
            "json",
        )
        assert len(answer.content) > 1000
    style = server.get(paths[0]).text
    assert not [found for found in re.findall(r"url\(([^)]*)\)|@import ([^;]*)", style) if "data:" not in found[0]]


@pytest.mark.parametrize("words", [{"temperature": 0}, {"temperature": 0.7, "top_p": 0.9}])
def test_a_token_level_student_is_served_alike(folders: Folders, words: dict[str, float]) -> None:
    writer = open_writer(folders.token)
    sampling = Sampling("tokens", float(words["temperature"]), top_p=words.get("top_p"))
    (wanted,) = generate(writer.model, [Request(ids(writer, PROMPT), 9, 2, sampling)])

    async def answer() -> Any:
        ready, loop = asyncio.Event(), asyncio.get_running_loop()
        engine = Engine(lambda: writer, Limits(), Measures(), loop.call_soon_threadsafe, ready.set)
        engine.start()
        await ready.wait()
        body = {"model": "tokens", "prompt": PROMPT, "max_tokens": 9, "seed": 2, "logprobs": 0, **words}
        asked = parse(CompletionAsk, json.dumps(body).encode())
        conversation = Conversation(engine, completion_choices(asked, writer, Limits()), math.inf)
        try:
            return await Completion(asked, Served(writer, "tokens"), conversation).whole()
        finally:
            engine.stop(0)
            await asyncio.to_thread(engine.ended.wait)

    (choice,) = asyncio.run(answer())["choices"]
    assert choice["text"] == text(writer, wanted.tokens)
    assert len(choice["logprobs"]["token_logprobs"]) == len(wanted.tokens)
