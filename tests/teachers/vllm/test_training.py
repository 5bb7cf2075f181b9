"""A student trained from a real server: it has the losses of the same rows stored; and what the server's end does."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latentforge.events import Event, read_events
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.spec.sections import PipelineSpec, TeacherSpec
from latentforge.spec.teacher import reach_of
from latentforge.teachers.http.flow import FlowControl
from latentforge.train import distill, effective
from latentforge.train.inprocess import execute_pipeline, plan
from latentforge.train.rehearsal import tiny_spec
from latentforge.train.run import execute
from latentforge.verdicts import ExitCode

from ..proxy import FaultProxy
from ..relay import Relay

STEPS = 6
BATCH = 8
LENGTH = 32
ROWS = BATCH * (LENGTH - 1)
VOCABULARY = 320
MakeSpec = Callable[..., PipelineSpec]


@pytest.fixture(scope="session")
def make_spec(served_folder: Path) -> MakeSpec:
    """The pipeline of a short student of the served model: ``make_spec(teacher={…}, k=…, **distill)``."""

    def make(*, teacher: dict[str, Any], k: int = 16, **asked: Any) -> PipelineSpec:
        wanted = {"steps": STEPS, "batch_size": BATCH, "checkpoint_every": 2, "require": (), **asked}
        spec = tiny_spec(**wanted)
        sizes = {"train_sequences": 40, "heldout_sequences": 4, "sequence_length": LENGTH}
        model = {"model": str(served_folder), "backend": "hf", **teacher}
        return spec.model_copy(
            update={
                "data": spec.data.model_copy(update=sizes),
                "score": spec.score.model_copy(update={"k": k}),
                "teacher": TeacherSpec.model_validate({**spec.teacher.model_dump(), **model}),
            }
        )

    return make


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all pipelines of this module run: their data run is one."""
    return tmp_path_factory.mktemp("training")


def served(url: str, **reach: Any) -> dict[str, Any]:
    return {"backend": "openai", "url": url, "served_model": "tiny", **reach}


def executed(spec: PipelineSpec, root: Path, *, attempt: int = 1) -> tuple[RunDir, ExitCode, str]:
    """The distill run of a pipeline, with its exit code and its text log; what it builds on is made where it lacks."""
    execute_pipeline(spec, root, through="score" if spec.distill.targets == "store" else "data", text=io.StringIO())
    planned = plan(spec)[-1]
    identity = planned.identity.at_attempt(attempt)
    before = planned.identity.at_attempt(attempt - 1).run_id if attempt > 1 else None
    reach = reach_of(spec.teacher)
    launch = LaunchRecord(identity.run_id, planned.kin, planned.resolved, predecessor=before, reach=reach)
    run = RunDir.create(root / "runs", identity, launch)
    text = io.StringIO()
    return run, execute(run.path, text=text), text.getvalue()


def steps(run: RunDir) -> list[dict[str, Any]]:
    return [e.fields for e in read_events(run.events_file) if e.kind == "step"]


def losses(run: RunDir) -> list[float]:
    return [s["loss"] for s in steps(run)]


def coverage(run: RunDir) -> dict[str, Any]:
    found = [e for e in read_events(run.events_file) if e.fields.get("name") == "kd_coverage"]
    fields: dict[str, Any] = found[-1].fields
    return fields


def verdict(run: RunDir) -> Event:
    name = "F-TEACHER-COVERAGE-001"
    return next(e for e in read_events(run.events_file) if e.fields.get("falsifier") == name)


def threads() -> list[str]:
    """The threads of prefetching that are left, and those of a client that do not end."""
    for thread in threading.enumerate():
        if thread.name.startswith("teacher"):
            thread.join(60)  # told to end, and not waited for, by the client
    return [t.name for t in threading.enumerate() if t.name.startswith(("latentforge-prefetch", "teacher"))]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that does not wait between its attempts: what is tried here is their end, not their pace."""
    monkeypatch.setattr(FlowControl, "_pause", lambda self, seconds, stop: None)


@pytest.fixture
def dying(vllm_url: str, impatient: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Relay]]:
    """A relay before the real server that is killed once the student has made ``step`` steps."""
    original = distill.log_step
    with Relay(vllm_url) as relay:

        def arm(step: int) -> Relay:
            def watched(log: Any, result: Any, **said: Any) -> None:
                original(log, result, **said)
                if said["step"] == step:
                    relay.kill()

            monkeypatch.setattr(distill, "log_step", watched)
            return relay

        yield arm


def test_a_server_a_store_and_dense_logits_give_the_student_the_same_losses(
    make_spec: MakeSpec, root: Path, vllm_url: str
) -> None:
    """Rows of the whole vocabulary say what dense logits say, so all three teach the same; fp32 on every side."""
    runs = {}
    for name, teacher, targets in (
        ("dense", {}, "live"),
        ("stored", {}, "store"),
        ("served", served(vllm_url), "live"),
    ):
        few = {"steps": 3, "batch_size": 4, "k": VOCABULARY}
        run, code, text = executed(make_spec(teacher=teacher, targets=targets, **few), root)
        assert code in (0, 1), text
        runs[name] = run
    for name in ("stored", "served"):
        assert losses(runs[name]) == pytest.approx(losses(runs["dense"]), rel=1e-4)
        kd = [s["kd"] for s in steps(runs[name])]
        assert kd == pytest.approx([s["kd"] for s in steps(runs["dense"])], rel=1e-3)
    said = effective.read(runs["served"])["effective"]
    assert said["distill"]["targets"] == "live"
    assert (said["teacher"]["backend"], said["score"]["k"]) == ("openai", VOCABULARY)
    counted = coverage(runs["served"])
    assert counted["value"] == 1.0
    assert counted["teacher_requests"] >= 3 * 4 + 4
    assert counted["teacher_p95_s"] >= counted["teacher_p50_s"] > 0
    assert counted["teacher_rate_limit_events"] == 0
    assert counted["teacher_tokens_per_s"] > 0
    assert threads() == []


def test_a_top_k_of_a_server_teaches_as_the_stored_one_does(make_spec: MakeSpec, root: Path, vllm_url: str) -> None:
    """At k = 16 of 320 the rest mass of the server's row is 1 - sum, the store's tail is summed: equal to rounding."""
    stored, code, text = executed(make_spec(teacher={}, targets="store"), root)
    assert code in (0, 1), text
    live, code, text = executed(make_spec(teacher=served(vllm_url), targets="live"), root)
    assert code in (0, 1), text
    assert losses(live) == pytest.approx(losses(stored), rel=1e-3)


def test_a_cache_pays_the_teacher_once(make_spec: MakeSpec, root: Path, vllm_url: str, tmp_path: Path) -> None:
    with FaultProxy(vllm_url) as relay:
        teacher = served(relay.url, cache=str(tmp_path / "cache.sqlite"))
        first, code, text = executed(make_spec(teacher=teacher, targets="live"), root)
        assert code in (0, 1), text
        asked = len(relay.documents)
        assert asked > 0
        second, code, text = executed(make_spec(teacher=teacher, targets="live", prefetch=0), root)
        assert code in (0, 1), text
        assert len(relay.documents) == asked
    assert losses(second) == losses(first)
    assert coverage(second)["teacher_hit_rate"] == 1.0
    assert coverage(second)["teacher_rows_from_store"] == STEPS * BATCH + 4


def test_a_server_killed_in_mid_run_stops_it_with_the_reason_and_it_resumes(
    make_spec: MakeSpec, root: Path, dying: Callable[[int], Relay]
) -> None:
    relay = dying(3)
    spec = make_spec(teacher=served(relay.url), targets="live", checkpoint_every=100, steps=12)
    run, code, text = executed(spec, root)
    assert code == ExitCode.UNKNOWN, text
    done = len(steps(run))
    assert 3 <= done < 12
    assert f"error: the teacher is lost before step {done + 1} of the student: teacher {relay.url}" in text
    assert "latentforge dispatch go --attempt next" in text
    assert (run.checkpoints / f"step-{done:06d}").is_dir()
    assert all(s["kd_rows"] == s["rows"] for s in steps(run))
    assert f"KD coverage 100.0 % ({done * ROWS} of {done * ROWS} rows had targets)" in text
    end = read_events(run.events_file)[-1]
    assert (end.kind, end.fields["code"]) == ("end", 3)
    assert threads() == []

    relay.revive()
    again, code, text = executed(spec, root, attempt=2)
    assert f"student resumes from step {done} of {run.run}" in text
    assert verdict(again).fields["outcome"] == "pass"
    assert losses(again)[:done] == losses(run)
    assert len(losses(again)) == 12
    assert coverage(again)["rows"] == 12 * ROWS


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_run_that_was_to_go_on_reports_the_coverage_that_is_left(
    make_spec: MakeSpec, root: Path, dying: Callable[[int], Relay], ahead: int
) -> None:
    relay = dying(2)
    teacher = served(relay.url)
    run, code, text = executed(
        make_spec(teacher=teacher, targets="live", on_teacher_loss="degrade", prefetch=ahead), root
    )
    assert code == 0, text
    made = steps(run)
    assert len(made) == STEPS
    assert all(s["rows"] == ROWS for s in made)
    assert [s["kd_rows"] for s in made[:2]] == [ROWS, ROWS]
    assert made[-1]["kd_rows"] == 0
    assert "kd" not in made[-1]
    taught = sum(s["kd_rows"] for s in made)
    share = taught / (STEPS * ROWS)
    assert 2 / STEPS <= share < 1.0
    assert coverage(run)["value"] == share
    assert f"KD coverage {int(share * 1000) / 10:.1f} % ({taught} of {STEPS * ROWS} rows had targets)" in text
    warnings = [e.fields["message"] for e in read_events(run.events_file) if e.kind == "warning"]
    assert any("the teacher is lost" in message for message in warnings)
    record = json.loads((run.out / "metrics.json").read_text())["models"]["student"]
    assert record["kd_coverage"] == share
    assert record["final"]["val_kl"] is not None
    found = verdict(run)
    assert found.fields["outcome"] == "pass"
    assert f"{taught} of {STEPS * ROWS} rows had targets" in found.fields["text"]
    assert threads() == []


def test_a_server_judges_what_the_student_writes(make_spec: MakeSpec, root: Path, vllm_url: str) -> None:
    """Half of the sequences are the student's own; the model in process judges them the same way."""
    own = {"on_policy": 0.5, "on_policy_tokens": 8, "steps": 3}
    run, code, text = executed(make_spec(teacher=served(vllm_url), targets="live", **own), root)
    assert code == 0, text
    assert "on-policy share 50.0 %: 96 tokens were the student's own" in text
    assert coverage(run)["value"] == 1.0
    assert all(s["on_policy_sequences"] == BATCH // 2 and s["kd_rows"] == ROWS for s in steps(run))
    beside, code, text = executed(make_spec(teacher={}, targets="store", **own), root)
    assert code == 0, text
    # The first step's text is drawn by the same weights; from there on rounding may draw another token.
    texts = [steps(one)[0]["on_policy_sha256"] for one in (run, beside)]
    assert texts[0] == texts[1]
    assert steps(run)[0]["ce"] == pytest.approx(steps(beside)[0]["ce"], rel=1e-5)


def test_a_server_that_cannot_be_asked_for_what_is_wanted_is_refused_before_training(
    make_spec: MakeSpec, root: Path, vllm_url: str
) -> None:
    run, code, text = executed(make_spec(teacher=served(f"{vllm_url}/nowhere"), targets="live"), root)
    assert code != 0
    assert "next: " in text
    assert not steps(run)
