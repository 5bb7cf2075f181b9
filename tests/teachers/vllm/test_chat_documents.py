"""A real chat API: its answers become training documents with their rows, each request is paid once."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentforge.data import ShardSet
from latentforge.errors import FailedError
from latentforge.events import read_events
from latentforge.evidence.configuration import compare_configuration
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.spec.sections import PipelineSpec
from latentforge.spec.teacher import reach_of
from latentforge.targets.store import TargetStore
from latentforge.train import effective
from latentforge.train.inprocess import execute_pipeline, plan
from latentforge.train.rehearsal import tiny_spec
from latentforge.train.run import execute
from latentforge.verdicts import ExitCode

from ..proxy import Fault, FaultProxy, NoLogprobs, Status

K = 20


@pytest.fixture
def chat_spec(chat_folder: Path, proxy: FaultProxy, tmp_path: Path) -> PipelineSpec:
    """Short prompts, answers of at most 24 tokens, packed in rows of 16; KD alone."""
    corpus = tmp_path / "prompts.jsonl"
    prompts = [f"def f{number}(x):\n    return" for number in range(320)]
    corpus.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts))
    spec = tiny_spec(steps=24, ce_weight=0.0, kd_weight=1.0, warmup_steps=2, require=(), checkpoint_every=24)
    return PipelineSpec.model_validate(
        {
            **spec.model_dump(),
            "data": {
                **spec.data.model_dump(),
                "corpus": str(corpus),
                "documents": "chat",
                "sequence_length": 16,
                "train_sequences": 24,
                "heldout_sequences": 1,
                "answer_tokens": 24,
            },
            "score": {**spec.score.model_dump(), "k": K},
            "teacher": {
                **spec.teacher.model_dump(),
                "backend": "openai",
                "url": proxy.url,
                "served_model": "tiny",
                "model": str(chat_folder),
                "concurrency": 4,
            },
        }
    )


def metrics(run: RunDir, name: str) -> list[dict[str, Any]]:
    return [e.fields for e in read_events(run.events_file) if e.kind == "metric" and e.fields["name"] == name]


def test_answers_train_a_student_with_their_own_rows(
    chat_spec: PipelineSpec, proxy: FaultProxy, tmp_path: Path
) -> None:
    text = io.StringIO()
    runs = execute_pipeline(chat_spec, tmp_path, text=text)
    assert sorted(runs) == ["data", "distill"]  # nothing is left to be scored
    identity = runs["data"].load_identity()
    compared = compare_configuration("data", identity.spec, effective.read(runs["data"]))
    # The size of a vocabulary that is given, not learnt, is what it is.
    assert (compared["unreported"], compared["differences"]) == (["vocab_size"], [])
    data = ShardSet.open(runs["data"].out)
    assert data.record["documents_from"] == "chat"
    kept = data.record["answers"]["kept"]
    assert kept >= 17
    assert "answers became documents" in text.getvalue()
    bodies = [request.body for request in proxy.requests if request.method == "POST"]
    assert all(body["temperature"] == 1.0 and body["top_logprobs"] == K for body in bodies)
    answers = data.record["answers"]
    assert len(bodies) == kept + sum(answers["dropped"].values()) + answers["refused"], text.getvalue()
    with TargetStore.open(runs["data"].out / "targets.sqlite") as store:
        for tokens in data.train.rows(np.arange(len(data.train))):
            targets = store.get(tokens)
            said = targets.ids[:, 0] >= 0
            # Every answered token is among the entries of its own row: vLLM puts it there.
            assert all(follows in row for row, follows, told in zip(targets.ids, tokens[1:], said, strict=True) if told)
            mass = np.exp(targets.logprobs.astype(np.float64)).sum(1) + np.exp(targets.tails[1.0].astype(np.float64))
            assert np.abs(mass - 1).max() < 1e-3
    first, last = (metrics(runs["distill"], "val_kl")[at]["value"] for at in (0, -1))
    assert last < 0.8 * first
    reported = metrics(runs["distill"], "kd_coverage")[-1]
    assert 0.8 < reported["value"] < 1.0  # the ends that the teacher did not say have no row


def test_a_stopped_run_goes_on_without_a_repeated_call(
    chat_spec: PipelineSpec, proxy: FaultProxy, tmp_path: Path
) -> None:
    planned = plan(chat_spec, through="data")[0]
    runs = tmp_path / "runs"
    runs.mkdir()

    def attempt(number: int, before: RunDir | None) -> tuple[RunDir, ExitCode, str]:
        identity = planned.identity.at_attempt(number)
        launch = LaunchRecord(
            identity.run_id,
            planned.kin,
            planned.resolved,
            predecessor=None if before is None else before.run,
            reach=reach_of(chat_spec.teacher),
        )
        folder, text = RunDir.create(runs, identity, launch), io.StringIO()
        return folder, execute(folder.path, text=text), text.getvalue()

    proxy.script([*[Fault()] * 12, Status(401, "no longer")])
    first, code, said = attempt(1, None)
    assert code == ExitCode.TRANSPORT, said
    answered = [request.body["messages"][0]["content"] for request in proxy.requests if request.outcome == "passed"]
    _, code, said = attempt(2, first)
    assert code == ExitCode.PASS, said
    assert f"takes over the answers of {first.run}" in said
    every = [request.body["messages"][0]["content"] for request in proxy.requests if request.outcome == "passed"]
    assert len(answered) >= 12
    assert len(every) == len(set(every))


def test_an_api_that_says_nothing_of_its_tokens_is_refused_at_its_first_answer(
    chat_spec: PipelineSpec, proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.script([NoLogprobs()] * 8)
    with pytest.raises(FailedError, match="without log-probabilities"):
        execute_pipeline(
            chat_spec, tmp_path, through="data", text=io.StringIO(), accept=lambda kind, code: code == ExitCode.PASS
        )
    assert len(proxy.outcomes) <= chat_spec.teacher.concurrency
