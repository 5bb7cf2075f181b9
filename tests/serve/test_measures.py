"""What Prometheus reads: names as it wants them, counters that only rise, and labels that no client can add to."""

from __future__ import annotations

import re

import psutil
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from latentforge.serve.app import PATHS

from .conftest import KEY, Running

BEARER = {"Authorization": f"Bearer {KEY}"}


def families(server: Running) -> list[Metric]:
    answer = server.get("/metrics", **BEARER)
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return list(text_string_to_metric_families(answer.text))


def test_each_figure_is_named_by_its_unit_and_explained(strict: Running) -> None:
    found = families(strict)
    assert len({one.name for one in found}) == len(found) > 10
    for one in found:
        assert re.fullmatch("latentforge_[a-z_]+", one.name)
        assert one.documentation.endswith(".")
        assert one.type in ("counter", "gauge", "histogram")
        if one.type == "counter":
            assert {sample.name for sample in one.samples} <= {one.name + "_total"}
        if one.type == "histogram":
            assert one.name.endswith(("_seconds", "_texts"))


def test_no_request_adds_a_label_and_counters_only_rise(strict: Running) -> None:
    def rising() -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        kinds = [one for one in families(strict) if one.type in ("counter", "histogram")]
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value for one in kinds for sample in one.samples
        }

    before = rising()
    for number in range(30):
        strict.get(f"/a/path/{number}", **BEARER)
        strict.get(f"/v1/models/{number}?x={number}", **BEARER)
        strict.client.request(f"A{number}", "/generate", headers={**BEARER, "X-Request-Id": str(number)})
    strict.post("/generate", {"prompt": "a", "max_new_tokens": 2}, **BEARER)
    after = rising()
    assert all(after[which] >= value for which, value in before.items())
    moved = [(name, dict(labels)) for (name, labels), value in after.items() if value != before.get((name, labels))]
    assert ("latentforge_tokens_total", {}) in moved
    assert {labels["path"] for _, labels in moved if "path" in labels} <= {*PATHS, "other"}
    assert {labels["status"] for _, labels in moved if "status" in labels} <= {"200", "404", "405"}
    assert {name for labels in [dict(which[1]) for which in after] for name in labels} <= {
        "path",
        "status",
        "end",
        "le",
    }


def test_the_key_is_nowhere_to_be_read(strict: Running) -> None:
    strict.get("/v1/models", **BEARER)
    strict.get("/" + KEY, **BEARER)
    assert KEY not in strict.get("/metrics", **BEARER).text
    assert KEY not in " ".join(psutil.Process(strict.process.pid).cmdline())
    # That its log has none is seen at the end of the fixture.
