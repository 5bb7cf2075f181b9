"""A student is trained from rows that were drawn from its teacher: ``score.mode = "sample"``, from spec to verdict."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentforge.errors import FailedError, RefusedError
from latentforge.events import read_events
from latentforge.spec.pipeline import effective_pipeline
from latentforge.spec.run import RunDir
from latentforge.spec.sections import PipelineSpec
from latentforge.targets import TargetStore
from latentforge.targets.row import SequenceTargets
from latentforge.targets.sampling import Sampling
from latentforge.teachers.hf import HFTeacher
from latentforge.teachers.sampled import SampledTeacher
from latentforge.teachers.scoring import check_agreement
from latentforge.teachers.store import StoreTeacher
from latentforge.train.inprocess import execute_pipeline
from latentforge.verdicts import ExitCode

from .conftest import short_spec

DRAWS = 24
LIMITS = {"ttl_days": 30.0, "max_bytes": 64 << 20}


def sampled_spec(**changed: Any) -> PipelineSpec:
    spec = short_spec(**changed)
    return spec.model_copy(update={"score": spec.score.model_copy(update={"mode": "sample", "draws": DRAWS, **LIMITS})})


@pytest.fixture(scope="module")
def said() -> io.StringIO:
    """What the runs wrote for people."""
    return io.StringIO()


@pytest.fixture(scope="module")
def trained(upstream: Path, tmp_path_factory: pytest.TempPathFactory, said: io.StringIO) -> dict[str, RunDir]:
    """The runs of a pipeline that scores by drawing, on the data and teacher that the other tests have."""
    root = tmp_path_factory.mktemp("sampled")
    shutil.copytree(upstream, root / "runs")
    return {str(role): run for role, run in execute_pipeline(sampled_spec(), root, text=said).items()}


def test_the_student_learns_from_drawn_rows_and_every_verdict_holds(trained: dict[str, RunDir]) -> None:
    events = list(read_events(trained["distill"].events_file))
    outcomes = {e.fields["falsifier"]: e.fields["outcome"] for e in events if e.kind == "verdict"}
    assert outcomes["F-DISTILL-SMOKE-001"] == "pass"
    assert set(outcomes.values()) == {"pass"}, outcomes
    metrics = json.loads((trained["distill"].out / "metrics.json").read_text())["models"]
    assert metrics["student"]["final"]["val_kl"] < metrics["student"]["initial"]["val_kl"]


def test_the_store_holds_the_draws_of_the_runs_seed_and_says_so(trained: dict[str, RunDir], said: io.StringIO) -> None:
    run = trained["score"]
    record = json.loads((run.out / "score.json").read_text())
    assert (record["mode"], record["draws"], record["seed"]) == ("sample", DRAWS, 7)
    assert record["agreement"]["worst_draws"] <= 0.1
    assert f"{DRAWS} draws a position" in said.getvalue()
    asked = HFTeacher.open(trained["teacher"].out / "model")
    with TargetStore.open(run.out / "targets.sqlite", mode="sample", draws=DRAWS, seed=7) as store:
        assert {"ttl_days": store.policy.ttl_seconds / 86400, "max_bytes": store.policy.max_bytes} == LIMITS
        # Asked again in another batch: the same tokens, but for what rounding moves over a border.
        teacher = SampledTeacher(asked, Sampling(DRAWS, 7))
        tokens = rows_of(trained["data"])[[0, 3, 11]]
        again = dict(teacher.score(list(tokens), k=store.k, temperatures=(1.0,)))
        for number, one in enumerate(tokens):
            stored = store.get(one)
            assert np.array_equal(stored.tails[1.0], np.full(len(one) - 1, -np.inf, dtype=np.float32))
            same = (stored.ids == again[number].ids).all(axis=1)
            assert same.mean() > 0.8
            assert np.allclose(stored.logprobs[same], again[number].logprobs[same], atol=1e-6)


def rows_of(data: RunDir) -> np.ndarray:
    from latentforge.data import ShardSet

    return ShardSet.open(data.out).train.rows(np.arange(16))


def test_a_store_whose_drawn_rows_are_shifted_is_found_out(trained: dict[str, RunDir], tmp_path: Path) -> None:
    from latentforge.data import ShardSet

    data = ShardSet.open(trained["data"].out)
    teacher = SampledTeacher(HFTeacher.open(trained["teacher"].out / "model"), Sampling(DRAWS, 7))
    stored = TargetStore.open(trained["score"].out / "targets.sqlite")
    asked = {"vocab_size": teacher.vocab_size, "mode": "sample", "draws": DRAWS, "seed": 7}
    shifted = TargetStore.create(tmp_path / "shifted.sqlite", stored.identity, stored.k, [1.0], **asked)
    for shard in (data.train, data.heldout):
        rows = shard.rows(np.arange(len(shard)))
        moved = ((tokens, _moved(one)) for tokens, one in zip(rows, stored.get_many(rows), strict=True))
        shifted.put_many(moved)
    assert check_agreement(teacher, stored, data).worst <= 0.1
    with pytest.raises(FailedError, match="are not the teacher's own at"):
        check_agreement(teacher, shifted, data)
    stored.close()
    shifted.close()


def _moved(one: SequenceTargets) -> SequenceTargets:
    return SequenceTargets(np.roll(one.ids, 1, axis=0), np.roll(one.logprobs, 1, axis=0), one.tails)


def test_a_drawn_row_is_not_cut_nor_tempered_nor_taken_for_another_seeds(trained: dict[str, RunDir]) -> None:
    path = trained["score"].out / "targets.sqlite"
    tokens = torch.from_numpy(rows_of(trained["data"])[:2])
    teacher = StoreTeacher.open(path)
    assert teacher.notes == (f"rows of {DRAWS} drawn tokens from the store (seed 7)",)
    assert teacher.targets(tokens, temperature=1.0).ids.shape[1] == DRAWS
    with pytest.raises(RefusedError, match=r"k = 4: .* biased"):
        teacher.targets(tokens, temperature=1.0, k=4)
    with pytest.raises(RefusedError, match="stored for T = 1 only"):
        teacher.targets(tokens, temperature=2.0)
    teacher.close()
    with pytest.raises(RefusedError, match="seed 7, not for 8"):
        TargetStore.open(path, seed=8)


def test_what_cannot_draw_is_refused_before_any_run_starts() -> None:
    model = {"model": "/models/t", "url": "http://127.0.0.1:9/v1"}
    values = sampled_spec().model_dump(mode="json")
    with pytest.raises(RefusedError, match=r"score.mode = 'sample' .* 'vllm-remote' gives none"):
        effective_pipeline(read(values | {"teacher": {"backend": "vllm-remote", **model}}))
    values["teacher"] = {"model": "/models/t"}
    values["distill"]["cross_tokenizer"] = True
    with pytest.raises(ValueError, match="would be biased"):
        read(values)
    values = sampled_spec().model_dump(mode="json")
    values["score"]["temperatures"] = [1.0, 2.0]
    with pytest.raises(ValueError, match="draws at T = 1"):
        read(values)


def read(values: dict[str, Any]) -> PipelineSpec:
    return PipelineSpec.model_validate_json(json.dumps(values))


def test_a_store_without_room_for_the_data_is_said_before_the_teacher_is_asked_for_all(
    upstream: Path, tmp_path: Path
) -> None:
    # Rows that push out others would be scored again by each next attempt, and none would ever be whole.
    shutil.copytree(upstream, tmp_path / "runs")
    spec = short_spec()
    spec = spec.model_copy(update={"score": spec.score.model_copy(update={"max_bytes": 65536})})
    text = io.StringIO()
    execute_pipeline(spec, tmp_path, through="score", text=text)
    assert "score.max_bytes = 65536 has no room for the targets of 112 sequences" in text.getvalue()
    assert "set score.max_bytes = " in text.getvalue()


@pytest.mark.parametrize(
    "asked", [{"draws": 65_537}, {"draws": 0}, {"ttl_days": 1e308}, {"ttl_days": -1.0}, {"max_bytes": 65_535}]
)
def test_bounds_that_no_store_can_keep_are_refused_before_any_run_starts(asked: dict[str, float]) -> None:
    values = sampled_spec().model_dump(mode="json")
    values["score"] |= asked
    with pytest.raises(ValueError, match=f"score.{next(iter(asked))}"):
        read(values)


def test_rows_that_grow_too_old_while_the_rest_is_scored_are_said_with_their_limit(
    trained: dict[str, RunDir], tmp_path: Path
) -> None:
    spec = sampled_spec()
    spec = spec.model_copy(update={"score": spec.score.model_copy(update={"ttl_days": 1e-12})})
    for kind in ("data", "teacher"):
        shutil.copytree(trained[kind].path, tmp_path / "runs" / trained[kind].run)
    text = io.StringIO()
    run = execute_pipeline(spec, tmp_path, through="score", text=text)["score"]
    assert read_events(run.events_file)[-1].fields["code"] == ExitCode.FAIL
    assert "rows grew older than score.ttl_days = 1e-12 in this run already" in text.getvalue()
    assert "give score.ttl_days more than" in text.getvalue()
