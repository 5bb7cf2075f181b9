"""The peer itself: what the other tests of this folder take for granted of the real server and the proxy before it."""

from __future__ import annotations

import json
import math
import urllib.request
from typing import Any

from latentforge.data import ShardSet

from ..proxy import FaultProxy, ShiftedEcho, WrongIds


def _rows(url: str, tokens: list[int], k: int) -> list[dict[str, Any]]:
    body = {"model": "tiny", "prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": k}
    request = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        rows = json.load(answer)["choices"][0]["prompt_logprobs"]
    assert len(rows) == len(tokens)
    assert rows[0] is None
    return rows[1:]


def test_the_server_gives_the_whole_vocabulary_at_each_position(vllm_url: str, served_data: ShardSet) -> None:
    tokens = served_data.train.rows([0])[0].tolist()[:-1]
    for row in _rows(vllm_url, tokens, -1):
        assert {int(key) for key in row} == set(range(320))
        assert abs(sum(math.exp(entry["logprob"]) for entry in row.values()) - 1) < 1e-4


def test_a_row_holds_the_token_that_follows_unless_a_fault_moved_it(proxy: FaultProxy, served_data: ShardSet) -> None:
    tokens = served_data.train.rows([0])[0].tolist()[:-1]
    proxy.script([WrongIds(), ShiftedEcho()])

    def found() -> int:
        return sum(str(token) in row for token, row in zip(tokens[1:], _rows(proxy.url, tokens, 1), strict=True))

    assert found() < len(tokens) - 1
    assert found() < len(tokens) - 1
    assert found() == len(tokens) - 1
    assert proxy.outcomes == ["wrong-ids", "shifted", "passed"]
    assert proxy.documents == [tuple(tokens)]
