"""Score runs against a real vLLM: killed, left by the server, over budget; no answer is paid for twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentforge.data import ShardSet
from latentforge.events import read_events
from latentforge.evidence.digests import tree_sha256
from latentforge.spec.code import running_code
from latentforge.spec.identity import RunIdentity
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.spec.sections import ScoreSpec, TeacherSpec
from latentforge.spec.teacher import answers_of, reach_of
from latentforge.targets import TargetStore
from latentforge.teachers.http.flow import FlowControl
from latentforge.train.run import execute

from ..proxy import Drop, Fault, FaultProxy, Hang

EXECUTE = "import sys; from pathlib import Path; from latentforge.train.run import execute; execute(Path(sys.argv[1]))"
SECONDS = 240.0
KEY = "planted-key-0123456789"

MakeRun = Callable[..., RunDir]


@pytest.fixture
def make_run(upstream: dict[str, RunDir], served_folder: Path) -> MakeRun:
    """``make_run(url, attempt=…, predecessor=…, **teacher)``: a score run against the server at ``url``."""
    data = upstream["data"]

    def make(url: str, *, attempt: int, predecessor: RunDir | None = None, **teacher: Any) -> RunDir:
        asked = TeacherSpec(backend="vllm-remote", url=url, served_model="tiny", model=str(served_folder), **teacher)
        spec = {"seed": 7, "score": ScoreSpec(k=8).model_dump(mode="json"), "teacher": answers_of(asked)}
        digest = tree_sha256(served_folder)
        inputs = {"data": f"run:{data.run}", "teacher": f"sha256:{digest}"}
        code = running_code()
        identity = RunIdentity("score", spec, inputs, code=code.digest, lock="0" * 64, attempt=attempt)
        resolved = {"data": {"run": data.run}, "teacher": {"path": str(served_folder), "sha256": digest}}
        launch = LaunchRecord(
            identity.run_id,
            "kin",
            resolved,
            predecessor=None if predecessor is None else predecessor.run,
            reach=reach_of(asked),
        )
        return RunDir.create(data.path.parent, identity, launch)

    return make


def stored(run: RunDir, data: ShardSet) -> set[tuple[int, ...]]:
    """The documents whose targets a run has."""
    with TargetStore.open(run.out / "targets.sqlite", readonly=True) as store:
        rows = [row for shard in (data.train, data.heldout) for row in shard.rows(range(len(shard)))]
        present = store.present(store.key(row) for row in rows)
        return {tuple(map(int, row)) for row in rows if store.key(row) in present}


def answered(proxy: FaultProxy, data: ShardSet) -> list[tuple[int, ...]]:
    """The whole documents that the server answered, each as the ids of its prompt."""
    return [one for one in proxy.documents if len(one) >= data.sequence_length - 1]


def awaited(what: Callable[[], bool], said: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline, said
        time.sleep(0.02)


def ended(run: RunDir) -> dict[str, Any]:
    last = read_events(run.events_file)[-1]
    assert last.kind == "end"
    return last.fields


def test_killed_in_the_middle_it_resumes_and_asks_for_no_document_again(
    make_run: MakeRun, proxy: FaultProxy, served_data: ShardSet
) -> None:
    first = make_run(proxy.url, attempt=1)
    # The short questions that find out what the server can do, some documents, and then it hangs with all it was asked.
    proxy.script([Fault()] * 30 + [Hang()] * 100)
    process = subprocess.Popen([sys.executable, "-c", EXECUTE, str(first.path)], stdout=subprocess.PIPE, text=True)
    try:
        awaited(lambda: proxy.outcomes.count("hung") == 8 or process.poll() is not None, "it did not come to hang")
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        before = answered(proxy, served_data)
        assert len(before) >= 15
        awaited(lambda: len(stored(first, served_data)) == len(before), "an answer was not stored at once")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        if process.stdout:
            process.stdout.close()
    kept = stored(first, served_data)
    assert len(kept) == len(before), "what was answered is stored, beside the writer and after it was killed"

    proxy.forget()
    second = make_run(proxy.url, attempt=2, predecessor=first)
    assert execute(second.path) == 0, ended(second)
    again = answered(proxy, served_data)
    prompts = {one[: len(again[0])] for one in kept}
    assert not prompts & set(again), "documents whose answer was stored were asked again"
    assert Counter(again).most_common(1)[0][1] == 1
    assert len(kept) + len(again) == len(served_data.train) + len(served_data.heldout)
    said = json.loads((second.out / "score.json").read_text())
    assert said["new_rows"] == len(again)
    assert said["agreement"]["positions"] >= 4


def test_a_server_lost_in_mid_run_ends_it_with_the_reason_and_what_is_kept(
    make_run: MakeRun, proxy: FaultProxy, served_data: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FlowControl.__init__.__kwdefaults__, "attempts", 1)
    monkeypatch.setenv("TEACHER_KEY", KEY)
    proxy.script([Fault()] * 20 + [Drop()] * 500)
    run = make_run(proxy.url, attempt=11, api_key_env="TEACHER_KEY")
    code = execute(run.path)
    kept = len(stored(run, served_data))
    assert code == 3
    assert kept == len(answered(proxy, served_data)) >= 5
    events = read_events(run.events_file)
    assert "[cut]" in events[-1].fields["reason"]
    assert proxy.url in events[-1].fields["reason"]
    warnings = [e.fields["message"] for e in events if e.kind == "warning"]
    assert any(f"({kept} of 72 sequences)" in message for message in warnings), warnings
    (counted,) = [e.fields for e in events if e.kind == "metric"]
    assert counted["teacher_failures"]["cut"] >= 1
    assert counted["teacher_requests"] == len(proxy.requests)
    assert not (run.out / "score.json").exists(), "an unfinished run has no product"
    written = "".join(
        p.read_text(errors="replace") for p in run.path.rglob("*") if p.is_file() and p.suffix != ".sqlite"
    )
    assert KEY not in written
    assert {request.key for request in proxy.requests} == {KEY}


def test_a_server_that_was_never_there_ends_it_before_anything_is_written(make_run: MakeRun) -> None:
    run = make_run("http://127.0.0.1:9/v1", attempt=21)
    assert execute(run.path) == 6
    assert "[connection]" in ended(run)["reason"]
    assert not run.out.exists()


def test_a_budget_ends_a_run_before_it_is_exceeded_and_a_larger_one_goes_on(
    make_run: MakeRun, proxy: FaultProxy, served_data: ShardSet
) -> None:
    run = make_run(proxy.url, attempt=31, max_requests=20)
    assert execute(run.path) == 2
    assert "[budget]" in ended(run)["reason"]
    assert len(proxy.requests) == 20
    kept = stored(run, served_data)
    proxy.forget()
    more = make_run(proxy.url, attempt=32, predecessor=run, max_requests=100)
    assert execute(more.path) == 0, ended(more)
    assert len(answered(proxy, served_data)) == 72 - len(kept)
