"""Teacher and student on one host: the worked tables of the GB10 notes, section (c), and what may share it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentforge.errors import RefusedError
from latentforge.memory import (
    MODES,
    CacheShape,
    HostMemory,
    KnownModel,
    MeasuredMemory,
    MemoryPlan,
    ModelShape,
    Term,
    admission,
    ceiling,
    choose_mode,
    margin,
    mode_of,
    pipeline_memory,
    plan_mode,
)
from latentforge.memory.engine import EngineSetting, engine_terms
from latentforge.memory.known import RATES
from latentforge.memory.plan import GIB
from latentforge.memory.training import Step, training_terms
from latentforge.spec.resolve import resolve_pipeline
from latentforge.spec.sections import PipelineSpec
from latentforge.verdicts import Outcome

QWEN3_NEXT: dict[str, Any] = {
    "model_type": "qwen3_next", "vocab_size": 151_936, "num_hidden_layers": 48, "hidden_size": 2048, "head_dim": 256,
    "num_attention_heads": 16, "num_key_value_heads": 2, "intermediate_size": 5120, "num_experts": 512,
    "full_attention_interval": 4, "linear_num_value_heads": 32, "linear_num_key_heads": 16,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
PARAMETERS = 80e9
GB10 = HostMemory(int(119.7 * GIB), 115 * GIB)
"""What torch sees of one host, and the middle of what is free there at the start."""


def near(found: int, gib: float, tolerance: float = 0.06) -> None:
    assert abs(found / GIB - gib) <= tolerance * gib + 0.051, f"{found / GIB:.2f} GiB, the table says {gib}"


def teacher_sum(method: str) -> tuple[dict[str, int], int]:
    weights = int(RATES[method] * PARAMETERS)
    model = KnownModel.of_config({**QWEN3_NEXT, "quantization_config": {"quant_method": method}}, weights)
    terms, unknown = engine_terms(model, EngineSetting(sequences=16, kv_tokens=8 * 32_768), "cuda")
    assert not unknown
    return {term.name: term.bytes for term in terms}, sum(term.bytes for term in terms)


def test_the_teachers_of_the_worked_table_come_to_its_sums() -> None:
    fp8, total = teacher_sum("fp8")
    for name, said in (("teacher", 76), ("kv", 6), ("sequences", 1.1), ("engine", 4), ("engine host", 6)):
        near(fp8[name], said, 0.01)
    near(fp8["logprobs"], 4, 0.15)
    near(total, 97, 0.01)
    int4, int4_total = teacher_sum("int4")
    near(int4["teacher"], 42, 0.08)  # without its unquantised parts, which the table counts up to 46
    assert 60 * GIB < int4_total < 67 * GIB


def test_the_caches_of_a_hybrid_model_are_counted_by_hand() -> None:
    cache = CacheShape.from_config(QWEN3_NEXT)
    assert (cache.layers, cache.kv_bytes(1)) == (12, 24 * 1024)
    assert cache.kv_bytes(32_768) == int(0.75 * GIB)
    assert cache.state_bytes(1) == 72 * 2**20
    typed = {**QWEN3_NEXT, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12}
    assert CacheShape.from_config(typed) == cache
    with pytest.raises(RefusedError, match="linear_num_value_heads"):
        CacheShape.from_config({**QWEN3_NEXT, "linear_num_value_heads": None})


@pytest.mark.parametrize(("billions", "states"), [(0.596, 8.9), (1.7, 25.3), (4.0, 59.6), (8.0, 119.2)])
def test_weights_and_states_of_a_fully_trained_student_are_the_tables_16_bytes_a_parameter(
    billions: float, states: float
) -> None:
    shape = ModelShape.qwen3(1000, layers=1, hidden=64, heads=4, kv_heads=2, intermediate=64)
    terms = training_terms(shape, Step(1, 1), who="student", device="cpu")
    share = sum(term.bytes for term in terms if term.name in ("student", "states")) / shape.parameters
    assert share == 16
    near(int(share * billions * 1e9), states, 0.01)


@pytest.mark.parametrize(("tokens", "said"), [(2048, 1.16), (4096, 2.32), (8192, 4.64)])
def test_one_fp32_copy_of_the_logits_is_the_tables(tokens: int, said: float) -> None:
    shape = ModelShape.qwen3(151_936, layers=1, hidden=64, heads=4, kv_heads=2, intermediate=64)
    terms = training_terms(shape, Step(1, tokens), who="student", device="cpu")
    near(next(term.bytes for term in terms if term.name == "logits"), said, 0.005)


@pytest.mark.parametrize(
    ("student", "teacher", "fits"),
    [(18, 67, True), (36, 67, False), (36, 58, True), (27, 67, True), (74, 67, False), (36, 0, True), (92, 0, True),
     (31, 67, True), (122, 0, False)],
)  # fmt: skip
def test_the_admission_formula_gives_the_verdicts_of_the_worked_table(student: int, teacher: int, fits: bool) -> None:
    plan = MemoryPlan("distill", (Term("teacher", teacher * GIB), Term("student", student * GIB)))
    assert admission(plan, GB10).outcome is (Outcome.PASS if fits else Outcome.FAIL)


def test_what_is_counted_refuses_where_it_alone_is_too_much_though_the_rest_is_unknown() -> None:
    for size, outcome in ((100, Outcome.UNKNOWN), (110, Outcome.FAIL)):
        plan = MemoryPlan("x", (Term("a", size * GIB),), unknown=("the student",))
        assert admission(plan, GB10).outcome is outcome


def test_what_is_known_is_refused_where_it_is_not_free_though_the_rest_is_unknown() -> None:
    engine = MemoryPlan("score", (Term("teacher", 80 * GIB, True),), unknown=("the teacher's keys and values",))
    for free, outcome in ((96, Outcome.UNKNOWN), (40, Outcome.FAIL), (0, Outcome.FAIL)):
        host = HostMemory(128 * GIB, free * GIB)
        assert admission(engine, host).outcome is outcome
        assert engine.verdict(host.total, host.available).outcome is outcome
    assert "128.0, 0 are free" in engine.verdict(128 * GIB, 0).text


def test_weights_that_are_not_counted_grow_with_the_numbers_that_the_engine_computes_with() -> None:
    experts = KnownModel(bytes=80 * GIB, vocabulary=1000, width=2)
    assert experts.engine_weights(None, 2) == 80 * GIB
    assert experts.engine_weights(None, 4) == 160 * GIB
    wide = KnownModel(bytes=80 * GIB, vocabulary=1000, width=4)
    assert wide.engine_weights(None, 2) == 80 * GIB, "never below its files"


@pytest.mark.parametrize(
    "wrong", [{"quantization_config": ["fp8"]}, {"quantization_config": "fp8"}, {"text_config": 5}]
)
def test_a_config_whose_tables_are_none_is_refused_and_never_counted(wrong: dict[str, object]) -> None:
    with pytest.raises(RefusedError, match=f"{next(iter(wrong))} = .* is not a table"):
        KnownModel.of_config({**QWEN3_NEXT, **wrong}, GIB)
    truth = KnownModel.of_config({**QWEN3_NEXT, "vocab_size": True, "max_position_embeddings": True})
    assert (truth.vocabulary, truth.positions) == (None, None)


def test_each_condition_of_the_admission_can_be_the_one_that_refuses() -> None:
    small = MemoryPlan("score", (Term("teacher", 40 * GIB),), load=80 * GIB)
    refused = {
        condition.name
        for judged in (
            admission(MemoryPlan("x", (Term("a", 110 * GIB),)), GB10),
            admission(MemoryPlan("x", (Term("a", GIB),), load=102 * GIB), GB10),
            admission(small, GB10, jobs=20),
            admission(small, GB10, measured_peak=90 * GIB),
        )
        for condition in judged.refused
    }
    assert refused == {"steady", "load", "warm-up", "first step"}
    assert admission(small, GB10, jobs=1, measured_peak=50 * GIB).outcome is Outcome.PASS


@given(st.integers(0, 2**37), st.integers(0, 2**37), st.integers(1, 2**38), st.integers(0, 2**38))
def test_what_is_admitted_is_under_the_ceiling_and_leaves_the_margin_free(
    teacher: int, load: int, total: int, available: int
) -> None:
    plan = MemoryPlan("x", (Term("a", teacher),), load=load)
    host = HostMemory(total, min(total, available))
    if admission(plan, host).outcome is Outcome.PASS:
        assert max(teacher, load) <= ceiling(total)
        assert max(teacher, load) + margin(total) <= (host.available or 0)


SERVED = ["teacher.backend=vllm-local", "teacher.model=/somewhere", "profile=full", "data.corpus=/corpus"]


def served(*more: str) -> PipelineSpec:
    return resolve_pipeline("tiny", env={}, overrides=[*SERVED, *more]).spec


def hybrid() -> KnownModel:
    weights = int(RATES["fp8"] * PARAMETERS)
    return KnownModel.of_config({**QWEN3_NEXT, "quantization_config": {"quant_method": "fp8"}}, weights)


def test_a_teacher_that_fills_the_host_runs_before_the_student_and_never_beside_it() -> None:
    student = KnownModel.of_shape(
        ModelShape(151_936, layers=28, hidden=2048, heads=16, kv_heads=8, intermediate=6144, head_dim=128)
    )  # 1.7 B
    changes = ["distill.student.init=/student", "distill.micro_batch_size=1", "data.sequence_length=2048"]
    spec = served("teacher.max_model_len=8192", *changes)
    plans = {
        mode: plan_mode(spec, mode, GB10, device="cuda", teacher=hybrid(), student=student, tokens=100_000_000)
        for mode in MODES
    }
    assert [plans[mode].outcome for mode in MODES] == [Outcome.PASS, Outcome.PASS, Outcome.FAIL]
    assert plans["sequential"].peak.bytes < plans["concurrent"].peak.bytes
    chosen, why = choose_mode(mode_of(spec), plans)
    assert chosen == "sequential"
    assert "side by side would not fit" in why
    assert plans["alternating"].note.startswith("5 shards of at least 20 M tokens")
    with pytest.raises(RefusedError, match=r"does not fit: stage distill .*; sequential fits"):
        choose_mode(mode_of(served("distill.targets=live", *changes)), plans)


def test_sequential_holds_the_larger_stage_and_concurrent_the_sum() -> None:
    spec = served()
    plans = {mode: plan_mode(spec, mode, GB10, device="cuda", teacher=hybrid()) for mode in MODES}
    score, distill = plans["sequential"].stages
    both = plans["concurrent"].stages[-1]
    runtime = next(term.bytes for term in score.terms if term.name == "runtime")
    assert plans["sequential"].peak.bytes == max(score.bytes, distill.bytes)
    # One process less; and held-out rows are kept, for which the teacher is asked once.
    kept = spec.data.heldout_sequences * (spec.data.sequence_length - 1) * (8 * spec.score.k + 4)
    assert both.bytes == score.bytes + distill.bytes - runtime + kept


@pytest.mark.parametrize("backend", ["vllm-remote", "openai"])
def test_a_teacher_elsewhere_takes_nothing_of_this_host(backend: str) -> None:
    spec = served(f"teacher.backend={backend}", "teacher.url=http://127.0.0.1:1/v1")
    plans = pipeline_memory(spec, device="cuda", teacher=hybrid())
    assert [term.name for term in plans["score"].terms] == ["runtime"]


def test_what_an_engine_cannot_tell_is_unknown_and_never_nothing() -> None:
    plan = pipeline_memory(served("teacher.quantization=exotic"), device="cuda", teacher=KnownModel())["score"]
    assert set(plan.unknown) == {
        "the teacher's weights",
        "the teacher's keys and values",
        "the teacher's log-probabilities",
    }
    assert admission(plan, GB10).outcome is Outcome.UNKNOWN


def test_a_teacher_in_process_is_counted_at_the_precision_in_which_it_computes() -> None:
    shape = ModelShape(151_936, 28, 1024, 16, 8, 3072, 128)
    plain, count = KnownModel(shape, 2 * shape.parameters), shape.parameters
    assert [plain.weights(p, "cpu") for p in ("auto", "fp32", "bf16")] == [4 * count, 4 * count, 2 * count]
    assert plain.weights("auto", "cuda") == 2 * count
    packed = KnownModel(shape, count // 2, quantization="fp8")
    assert packed.weights("auto", "cuda") == count // 2
    assert packed.weights("quantized", "cpu") == 2 * count  # expanded: nothing computes with it there


def test_the_kernel_tells_what_is_there_and_a_smaller_control_group_counts(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (groups / "a" / "b").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 700 kB\n")
    (proc / "self" / "cgroup").write_text("0::/a/b\n")
    assert HostMemory.read(proc, groups) == HostMemory(1_024_000, 716_800)
    (groups / "a" / "memory.max").write_text("500000\n")
    (groups / "a" / "memory.current").write_text("400000\n")
    (groups / "a" / "memory.stat").write_text("anon 1\ninactive_file 50000\nactive_file 10000\n")
    assert HostMemory.read(proc, groups) == HostMemory(500_000, 160_000, limited=True)
    assert HostMemory.read(tmp_path / "nothing", groups) == HostMemory(None, None)
    assert HostMemory.read().total is not None


@pytest.mark.parametrize(
    ("planned", "measured", "warns"),
    [(10, 11.4, False), (10, 11.6, True), (100, 107, False), (100, 109, True), (100, 20, False), (0.5, 0.6, True)],
)
def test_a_run_that_held_15_percent_or_8_gib_more_than_planned_is_named(
    planned: float, measured: float, warns: bool
) -> None:
    found = MeasuredMemory(int(planned * GIB), int(measured * GIB))
    assert (found.warning is not None) is warns


def test_what_the_process_held_before_is_not_the_runs() -> None:
    plan = MemoryPlan("x", (Term("a", GIB), Term("engine", 50 * GIB, elsewhere=True), Term("runtime", GIB)))
    found = MeasuredMemory.of(plan, peak=6 * GIB, in_use=5 * GIB, before=4 * GIB)
    assert (found.measured, found.resident) == (2 * GIB, 3 * GIB)
    assert MeasuredMemory.of(plan, peak=5 * GIB, in_use=None, before=4 * GIB).measured == 2 * GIB
    assert MeasuredMemory.of(plan, peak=2 * GIB, in_use=None, before=GIB // 2) == MeasuredMemory(2 * GIB, 2 * GIB)
    loading = MemoryPlan("x", (Term("a", GIB), Term("runtime", GIB)), load=3 * GIB)
    assert loading.own_bytes == 4 * GIB


def test_a_run_that_the_host_cannot_hold_refuses_itself_before_it_loads_anything(tmp_path: Path) -> None:
    from latentforge.events import read_events
    from latentforge.spec.run import RunDir
    from latentforge.train.inprocess import execute_pipeline

    spec = resolve_pipeline("tiny", env={}, overrides=["teacher.batch_size=100000000", "teacher.steps=1"]).spec
    text = io.StringIO()
    with pytest.raises(Exception, match="ended with fail") as caught:
        execute_pipeline(spec, tmp_path, through="teacher", text=text, accept=lambda kind, code: code == 0)
    assert "this host cannot hold the run: teacher" in str(caught.value)
    (folder,) = (tmp_path / "runs").glob("teacher-*")
    events = read_events(RunDir(folder).events_file)
    phases = {event.fields["name"] for event in events if event.kind == "phase"}
    planned = next(event.fields for event in events if event.kind == "memory")
    assert "load" not in phases
    assert events[-1].fields["code"] == 1
    assert planned["planned_bytes"] > planned["total_bytes"]
    assert json.loads(RunDir(folder).effective_file.read_bytes())["memory"]["planned_bytes"] == planned["planned_bytes"]
    assert "latentforge memory SPEC" in text.getvalue()


def test_the_cache_that_an_engine_is_started_with_is_the_one_that_the_plan_counts(tmp_path: Path) -> None:
    from latentforge.memory.engine import pinned_kv_bytes
    from latentforge.spec.sections import TeacherSpec

    config = {**QWEN3_NEXT, "max_position_embeddings": 262_144, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    known = KnownModel.of_folder(tmp_path)
    spec = TeacherSpec(backend="vllm-local", model=str(tmp_path), max_model_len=32_768)
    assert pinned_kv_bytes(known, EngineSetting.of(spec, known)) == int(1.5 * GIB)  # two of 32 K tokens
    plan = pipeline_memory(served("teacher.max_model_len=32768"), device="cuda", teacher=known)["score"]
    assert next(term.bytes for term in plan.terms if term.name == "kv") == int(1.5 * GIB)
    short = TeacherSpec(backend="vllm-local", model=str(tmp_path), max_model_len=16)
    assert pinned_kv_bytes(known, EngineSetting.of(short, known)) == 256 << 20
