"""A pipeline's last run that measures its student: what it takes, what it leaves, and what its gates do."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from latentforge.errors import RefusedError
from latentforge.events import read_events
from latentforge.evidence.digests import tree_sha256
from latentforge.memory.estimate import pipeline_memory
from latentforge.spec.capabilities import wanted_of
from latentforge.spec.resolve import resolve_pipeline
from latentforge.spec.run import RunDir
from latentforge.spec.sections import PipelineSpec
from latentforge.train.inprocess import execute_pipeline, plan
from latentforge.verdicts import ExitCode
from latentforge.writers import opening
from latentforge.writers.bench.hits import Hits, hits_of
from latentforge.writers.opening import Writer

SHORT = [
    "through=latent",
    "data.chunk=4",
    "data.train_sequences=64",
    "teacher.steps=2",
    "distill.steps=2",
    "distill.require=[]",
    "autoencoder.latent=16",
    "autoencoder.width=32",
    "autoencoder.inner=32",
    "autoencoder.steps=3",
    "autoencoder.require=[]",
    "latent.student.layers=1",
    "latent.student.hidden=32",
    "latent.student.intermediate=32",
    "latent.steps=3",
    "latent.require=[]",
    "latent.beside=true",
    "bench.prompts=3",
    "bench.max_tokens=6",
    "bench.repeats=2",
    "bench.device=cpu",
]

QUALITY = ["bench.measure=true", "bench.quality_rows=4", "bench.max_tokens=300"]


def _spec(*changes: str) -> PipelineSpec:
    return resolve_pipeline("tiny", env={}, overrides=[*SHORT, *changes]).spec


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pipeline's runs lie: those of one test are kept for the next."""
    return tmp_path_factory.mktemp("bench-run")


def _made(root: Path, *changes: str) -> tuple[RunDir, RunDir, list[dict[str, Any]], str]:
    """The student's run, the bench run, its verdicts and its log."""
    text = io.StringIO()
    runs = execute_pipeline(_spec(*changes), root, text=text)
    bench = runs["bench"]
    events = read_events(bench.events_file)
    return (
        runs.get("latent", runs["distill"]),
        bench,
        [e.fields for e in events if e.kind == "verdict"],
        text.getvalue(),
    )


def test_the_student_that_was_measured_comes_with_its_report_and_verdicts(root: Path) -> None:
    latent, bench, verdicts, log = _made(root, "bench.min_tokens_per_second=0.001", "bench.max_peak_memory_gb=100")
    outcomes = [(one["falsifier"], one["outcome"]) for one in verdicts]
    assert outcomes == [("F-BENCH-SPEED-001", "pass"), ("F-BENCH-MEMORY-001", "pass")]
    assert read_events(bench.events_file)[-1].fields["code"] == 0
    report = json.loads((bench.out / "bench.json").read_bytes())
    names = [(one["name"], one["folder"].partition("-")[0]) for one in report["contestants"]]
    assert names == [("latent, K = 4", "latent"), ("token-level", "distill")]
    assert report["contestants"][0]["folder"] == latent.run
    assert report["asked"]["prompts"] == 3
    assert tree_sha256(bench.out / "student") == tree_sha256(latent.out / "student")
    assert (bench.out / "bench.png").stat().st_size > 1000
    assert "latent, K = 4" in log
    assert str(root) not in (bench.out / "bench.json").read_text()


def test_quality_is_measured_beside_speed_where_rows_are_given(root: Path) -> None:
    latent, bench, _, log = _made(root, "bench.measure=true", "bench.quality_rows=3")
    report = json.loads((bench.out / "quality.json").read_bytes())
    assert [one["kind"] for one in report["models"]] == ["latent", "token"]
    assert report["protocol"]["data"].startswith("data-")
    shown = json.loads((bench.out / "bench.json").read_bytes())["contestants"]
    for model, contestant in zip(report["models"], shown, strict=True):
        for name in ("brier_lm", "bits_per_byte"):
            assert contestant["quality"][name]["value"] == model[name]["value"]
    said = {(e.fields["name"], e.fields["model"]) for e in read_events(bench.events_file) if e.kind == "metric"}
    assert {("brier_lm", latent.run), ("bits_per_byte", latent.run)} <= said
    assert "BrierLM" in log
    assert str(root) not in (bench.out / "quality.json").read_text()


def test_each_student_is_opened_once_for_quality_and_speed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ["bench.measure=true", "bench.quality_rows=2"]
    trained = execute_pipeline(_spec(*changes), root, through="latent")
    opened: list[Path] = []

    class Counted(Writer):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            opened.append(self.folder)

    monkeypatch.setattr(opening, "Writer", Counted)
    _made(root, *changes)
    assert opened == [trained[role].out / "student" for role in ("latent", "distill")]


def test_a_gate_that_cannot_be_passed_fails_the_run(root: Path) -> None:
    _, bench, verdicts, _ = _made(root, "bench.max_p95_chunk_s=1e-9", "bench.min_hit_rate=0.8")
    outcomes = [(one["falsifier"], one["outcome"]) for one in verdicts]
    assert outcomes == [("F-BENCH-LATENCY-001", "fail"), ("F-BENCH-CACHE-001", "unknown")]
    assert read_events(bench.events_file)[-1].fields["code"] == ExitCode.FAIL


def test_a_student_that_is_fed_from_a_store_has_a_hit_rate_of_one(root: Path, tmp_path: Path) -> None:
    student, bench, verdicts, _ = _made(root, "through=distill", "bench.min_hit_rate=0.8")
    assert [(one["falsifier"], one["outcome"], one["text"]) for one in verdicts] == [
        ("F-BENCH-CACHE-001", "pass", f"hit rate 100.0% >= 80.0% of the answers of {student.run}")
    ]
    copied = tmp_path / bench.run
    copied.mkdir()
    shutil.copy(bench.events_file, copied)
    assert hits_of(copied) == Hits(1.0, bench.run)


@pytest.mark.parametrize(
    ("changes", "last"),
    [([], "latent"), (["bench.measure=true"], "bench"), (["bench.max_peak_memory_gb=100"], "bench")],
)
def test_a_bench_run_is_made_where_a_gate_is_set_or_it_is_asked_for(changes: list[str], last: str) -> None:
    spec = _spec(*changes)
    assert [run.kind for run in plan(spec)][-1] == last
    assert ("bench" in wanted_of(spec)["kinds"]) == (last == "bench") == ("bench" in pipeline_memory(spec))


def test_a_token_level_student_is_measured_by_itself() -> None:
    runs = {run.kind: run for run in plan(_spec("through=distill", "bench.measure=true"))}
    assert runs["bench"].resolved == {
        "data": {"run": runs["data"].run_id},
        "student": {"run": runs["distill"].run_id},
    }


def test_gates_are_no_part_of_what_the_student_is() -> None:
    """Another gate is another bench of the same student: nothing is trained again."""
    one, other = (plan(_spec(f"bench.min_tokens_per_second={gate}")) for gate in (1, 2))
    assert [run.run_id for run in one[:-1]] == [run.run_id for run in other[:-1]]
    assert one[-1].run_id != other[-1].run_id


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["bench.measure=true", "latent.beside=false", "bench.transformers=true"], "no token-level student is trained"),
        (["bench.measure=true", "bench.temperature=0.5"], "without latent.tempered_weight knows temperature 1 alone"),
        (["bench.measure=true", "bench.method=vote", "bench.temperature=0.4"], "which knows 0 and 1/n"),
        (["bench.measure=true", "bench.method=exact", "bench.temperature=0"], "knows temperatures above 0"),
        (
            ["bench.method=tokens", "bench.measure=true", "latent.student.token_layers=0", "latent.token_ce_weight=0"],
            "there is no token head to write by",
        ),
        (["bench.measure=true", "bench.prompt_tokens=3"], "less than a chunk of 4"),
        (["bench.top_p=0.5"], "method 'tokens' alone knows it"),
        (["bench.measure=true", "bench.prompts=33"], "bench.prompts = 33 is more than data.heldout_sequences = 32"),
        ([*QUALITY, "bench.quality_rows=33"], "bench.quality_rows = 33 is more than data.heldout_sequences = 32"),
        ([*QUALITY, "bench.prompts=24"], r"24 texts of 16 \+ 300 tokens: 32 rows of 32 tokens hold 23 at most"),
    ],
)
def test_what_no_bench_could_measure_is_refused_before_anything_is_trained(changes: list[str], said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        _spec(*changes)
