"""What a bench counts: tokens that were written, in turns, by a clock; and gates that can fail."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch

from latentforge.errors import RefusedError
from latentforge.events import EventLog
from latentforge.spec.bench import BenchSpec
from latentforge.spec.identity import RunIdentity
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.students.latent.requests import Sampling
from latentforge.students.token_session import TokenModel
from latentforge.verdicts import Outcome
from latentforge.writers.bench import checks
from latentforge.writers.bench.contestants import Engine, TransformersGenerate
from latentforge.writers.bench.cost import flops_per_token
from latentforge.writers.bench.gates import Seen, judge
from latentforge.writers.bench.hits import Hits, hits_of
from latentforge.writers.bench.memory import Meter, Peak
from latentforge.writers.bench.quality import read_quality
from latentforge.writers.bench.turns import Asked, Clock, Text, measure, quantile, ratios
from latentforge.writers.opening import open_writer

from ..latent_folders import Folders

CPU = torch.device("cpu")


def test_speed_is_of_tokens_that_were_written_and_not_of_those_that_were_asked_for() -> None:
    asked, found = checks.scripted(max_tokens=64, texts=3)
    assert [turn.produced for turn in found.turns] == [3 * checks.PRODUCED] * 2
    assert found.tokens_per_second == pytest.approx([checks.PRODUCED / checks.SECONDS] * 2)
    assert found.steps_per_second == pytest.approx([checks.STEPS / checks.SECONDS] * 2)
    assert asked.tokens == 192


def test_no_more_is_counted_than_was_asked_for_where_a_chunk_holds_more() -> None:
    _, found = checks.scripted(max_tokens=6)
    assert [turn.produced for turn in found.turns] == [18, 18]
    assert [turn.steps for turn in found.turns] == [6, 6]


def test_reading_the_prompt_is_in_the_first_chunk_and_in_no_other() -> None:
    _, found = checks.scripted()
    assert found.to_first == pytest.approx([checks.READING + checks.STEP] * 6)
    assert len(found.between) == 6 * (checks.STEPS - 1)
    assert max(found.between) == pytest.approx(checks.SLOW)
    assert sorted(found.between)[-7] == pytest.approx(checks.STEP)


def test_texts_of_a_batch_share_its_steps() -> None:
    model = checks.ScriptedModel()
    asked = Asked(((1, 2, 3, 4),) * 3, 64, Sampling(), batch=2, repeats=1)
    (found,) = measure([Engine("scripted", model)], asked, Meter(CPU), clock=model.clock)
    assert found.turns[0].seconds == pytest.approx(2 * checks.SECONDS)  # two texts at once, then one
    assert found.to_first == pytest.approx([checks.READING + checks.STEP] * 3)


class Noted:
    """A contestant that notes its turns, each of them a second for each second of its name."""

    def __init__(self, name: str, turns: list[str], seconds: list[float]) -> None:
        self.name, self._turns, self._seconds, self.now = name, turns, seconds, 0.0

    def write(self, asked: Asked, clock: Clock) -> list[Text]:
        self._turns.append(self.name)
        self._seconds[0] += 2.0 if self.name == "slow" else 1.0
        return [Text((1,) * 10, (0.5, 1.0), 2, 2)]


def test_contestants_take_turns_and_each_second_round_goes_the_other_way() -> None:
    turns: list[str] = []
    now = [0.0]
    both = [Noted(name, turns, now) for name in ("quick", "slow")]
    quick, slow = measure(both, Asked(((1,),), 10, Sampling(), repeats=2), Meter(CPU), clock=lambda: now[0])
    assert turns == ["quick", "slow", "quick", "slow", "slow", "quick"]  # the first turns are not counted
    assert len(quick.turns) == 2
    assert ratios(quick, slow) == [2.0, 2.0]


def test_a_quantile_is_a_reading_that_so_many_do_not_exceed() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([float(n) for n in range(1, 21)], 0.95) == 19.0
    assert quantile([float(n) for n in range(1, 20)], 0.95) == 19.0
    assert quantile([], 0.5) is None


def test_transformers_greedy_text_is_the_engines_own(folders: Folders, tmp_path: Path) -> None:
    """The same model, the same beginning, the same end: what is timed is the same work, whatever way of writing the
    folder's generation_config.json suggests."""
    folder = Path(shutil.copytree(folders.token / "out/student", tmp_path / "student"))
    suggested = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 9.0, "max_length": 7, "eos_token_id": 5}
    (folder / "generation_config.json").write_text(json.dumps(suggested))
    model = TokenModel.open(folder)
    prompts = tuple(tuple(row[:n].tolist()) for row, n in zip(folders.rows[:3], (3, 9, 5), strict=True))
    asked = Asked(prompts, 12, Sampling("vote", 0.0, 3), batch=2, repeats=1)
    theirs = TransformersGenerate("transformers", folder, model.eos_id, CPU)
    ours, other = measure([Engine("token-level", model), theirs], asked, Meter(CPU))
    assert [text.tokens for text in ours.turns[0].texts] == [text.tokens for text in other.turns[0].texts]
    for found in (ours, other):
        assert all(len(text.arrivals) == len(text.tokens) for text in found.turns[0].texts)


def test_transformers_is_not_credited_with_what_follows_an_end(folders: Folders) -> None:
    """A text of a batch that is over is padded while the others go on; EOS is made likely, so that some end early."""
    folder = folders.token / "out/student"
    model = TokenModel.open(folder)
    theirs = TransformersGenerate("transformers", folder, model.eos_id, CPU)
    with torch.no_grad():
        head = theirs._model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
        head.bias[model.eos_id] = 4.0
    asked = Asked(((1, 2), (3,), (4, 5, 6), (7,)), 24, Sampling(), batch=4, repeats=1)
    texts = theirs.write(asked, checks.ScriptedModel().clock)
    lengths = [len(text.tokens) for text in texts]
    assert min(lengths) < max(lengths)
    for text in texts:
        assert model.eos_id not in text.tokens[:-1]
        assert len(text.tokens) == 24 or text.tokens[-1] == model.eos_id
        assert len(text.arrivals) == len(text.tokens)


def test_a_gate_that_is_not_set_has_no_verdict() -> None:
    seen = Seen([1.0], [1.0], [], Peak(1, None, True), None)
    assert judge(BenchSpec(), seen) == []


def test_a_gate_on_chunks_is_unknown_where_no_text_had_two() -> None:
    seen = Seen([1.0], [0.1], [], Peak(1, None, True), None)
    (verdict,) = judge(BenchSpec(max_p95_chunk_s=1.0), seen)
    assert verdict.outcome is Outcome.UNKNOWN
    (verdict,) = judge(BenchSpec(max_p95_chunk_s=1.0, max_p95_first_chunk_s=0.05), seen)
    assert verdict.outcome is Outcome.FAIL


def test_the_gate_on_memory_counts_process_and_gpu_together() -> None:
    seen = Seen([1.0], [1.0], [1.0], Peak(60_000_000_000, 50_000_000_000, True), None)
    (verdict,) = judge(BenchSpec(max_peak_memory_gb=100.0), seen)
    assert verdict.line() == "F-BENCH-MEMORY-001 FAIL peak memory 110 > 100 GB, process and GPU together"


def _run(runs: Path, kind: str, number: int, inputs: dict[str, str], rates: list[float]) -> RunDir:
    identity = RunIdentity(kind=kind, spec={"seed": number}, inputs={}, code="c" * 64, lock="d" * 64)
    resolved = {name: {"run": run} for name, run in inputs.items()}
    run = RunDir.create(runs, identity, LaunchRecord(identity.run_id, "e" * 64, resolved))
    with EventLog(run.events_file, run.run, text=StringIO()) as log:
        for rate in rates:
            log.emit("metric", name="teacher", value=3, step=1, split="score", teacher_hit_rate=rate)
    return run


def test_a_hit_rate_is_the_last_that_a_run_says_of_itself(tmp_path: Path) -> None:
    filled = _run(tmp_path, "score", 2, {}, [0.0])
    distill = _run(tmp_path, "distill", 3, {"targets": filled.run}, [0.1, 0.95])
    assert hits_of(distill.path) == Hits(0.95, distill.run)


def test_of_a_run_that_says_none_it_is_the_lowest_of_those_that_it_is_made_from(tmp_path: Path) -> None:
    data = _run(tmp_path, "data", 1, {}, [])
    score = _run(tmp_path, "score", 2, {"data": data.run}, [0.9])
    lower = _run(tmp_path, "continuations", 4, {"data": data.run}, [0.3])
    latent = _run(tmp_path, "latent", 5, {"data": data.run, "targets": score.run, "continuations": lower.run}, [])
    bench = _run(tmp_path, "bench", 6, {"student": latent.run}, [])
    assert hits_of(latent.path) == hits_of(bench.path) == Hits(0.3, lower.run)
    assert hits_of(data.path) is None


def test_a_folder_that_is_no_run_has_no_hit_rate(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="is no run's folder"):
        hits_of(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"models": 3}',
        '{"models": [{"name": "a"}]}',
        '{"models": [{"digests": {"student": "a"}, "brier_lm": {}}]}',
    ],
)
def test_a_report_of_quality_that_is_none_is_refused_by_its_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "quality.json"
    file.write_text(content)
    with pytest.raises(RefusedError, match=r"quality\.json is no report of bench quality"):
        read_quality(file)


def test_quality_is_found_by_the_weights_digest(tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    model = {"digests": {"student": "abc"}, "brier_lm": {"value": 4.0, "low": 3.5, "high": 4.5}, "bits_per_byte": None}
    file.write_text(json.dumps({"models": [model]}))
    found = read_quality(file)["abc"]
    assert (found.brier_lm and found.brier_lm.low, found.bits_per_byte) == (3.5, None)


@pytest.mark.parametrize(
    ("check", "mutant"),
    [
        (checks.speed_counts_what_was_produced, "asked"),
        (checks.latency_is_the_slow_ones, "mean"),
        (checks.memory_is_the_peak, "after"),
        (checks.cache_must_be_known, "assumed"),
    ],
)
def test_each_gate_holds_and_its_planted_fault_is_seen(check, mutant: str) -> None:  # type: ignore[no-untyped-def]
    assert check().passed is True
    assert check(mutant=mutant).passed is False


def test_a_model_whose_heads_are_not_its_width_has_no_cost_that_is_counted(folders: Folders) -> None:
    model = open_writer(folders.token).model
    assert isinstance(model, TokenModel)
    asked = Asked(((1, 2),), 2, Sampling())
    texts = [Text((3, 4), (0.1, 0.2), 2, 2)]
    assert flops_per_token(model, asked, texts) is not None
    model.student.model.config.head_dim *= 2
    assert flops_per_token(model, asked, texts) is None
