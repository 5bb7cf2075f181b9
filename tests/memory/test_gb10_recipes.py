"""The recipes for a GB10 fit one: each stage of each, with the teacher and the students that they are written for."""

from __future__ import annotations

from typing import Any

import pytest

from latentforge.errors import RefusedError
from latentforge.memory import MODES, HostMemory, KnownModel, ModelShape, choose_mode, mode_of, plan_mode
from latentforge.memory.known import RATES
from latentforge.memory.plan import GIB
from latentforge.spec.hosts import check_hosts
from latentforge.spec.pipeline import check_profile, effective_pipeline
from latentforge.spec.recipe import read_recipe, recipe_names
from latentforge.spec.resolve import resolve_pipeline
from latentforge.verdicts import Outcome

BUDGET = 100 * GIB
"""The most that the GB10 field notes plan for on one host (section (c)); one hung near 109.5."""
HOSTS = {
    "all of it": HostMemory(int(119.7 * GIB), 115 * GIB),
    "what some give to CUDA": HostMemory(int(119.7 * GIB), 113 * GIB),
}
QWEN3_NEXT: dict[str, Any] = {
    "model_type": "qwen3_next", "vocab_size": 151_936, "num_hidden_layers": 48, "hidden_size": 2048, "head_dim": 256,
    "num_attention_heads": 16, "num_key_value_heads": 2, "intermediate_size": 5120, "num_experts": 512,
    "full_attention_interval": 4, "linear_num_value_heads": 32, "linear_num_key_heads": 16,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "max_position_embeddings": 262_144,
}  # fmt: skip
STUDENTS = {
    "gb10-0.6b": ModelShape(151_936, 28, 1024, 16, 8, 3072, 128),
    "gb10-1.7b": ModelShape(151_936, 28, 2048, 16, 8, 6144, 128),
}
"""Qwen3-0.6B and Qwen3-1.7B, whose vocabulary is the teacher's."""


def teacher(method: str) -> KnownModel:
    weights = int(RATES[method] * 80e9)
    return KnownModel.of_config({**QWEN3_NEXT, "quantization_config": {"quant_method": method}}, weights)


def spec_of(recipe: str, *more: str) -> Any:
    given = [f"{field}=/somewhere" for field in read_recipe(recipe).needs]
    return effective_pipeline(resolve_pipeline(recipe, env={}, overrides=[*given, *more]).spec)[0]


def plan(recipe: str, method: str, host: HostMemory, mode: str = "sequential", *more: str) -> Any:
    student = KnownModel.of_shape(STUDENTS[recipe]) if recipe in STUDENTS else None
    spec = spec_of(recipe, *more)
    tokens = spec.data.train_sequences * spec.data.sequence_length
    return plan_mode(spec, mode, host, device="cuda", teacher=teacher(method), student=student, tokens=tokens)


RECIPES = [name for name in recipe_names() if name.startswith("gb10-")]


def test_there_is_a_recipe_for_a_first_run_two_token_students_and_a_latent_one() -> None:
    assert {"gb10-smoke", "gb10-0.6b", "gb10-1.7b", "gb10-latent-4"} <= set(RECIPES)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("method", ["fp8", "int4"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_stage_of_a_gb10_recipe_stays_within_the_budget_of_the_field_notes(
    recipe: str, method: str, host: str
) -> None:
    planned = plan(recipe, method, HOSTS[host])
    assert planned.outcome is Outcome.PASS
    assert 0 < planned.peak.bytes <= BUDGET
    for stage in planned.stages:
        assert stage.unknown == (), stage
    spec = spec_of(recipe)
    chosen, _why = choose_mode(mode_of(spec), {mode: plan(recipe, method, HOSTS[host], mode) for mode in MODES})
    assert chosen == "sequential"


@pytest.mark.parametrize(
    ("recipe", "stage"), [("gb10-0.6b", "distill"), ("gb10-1.7b", "distill"), ("gb10-latent-4", "latent")]
)
def test_on_two_linked_hosts_each_stays_within_the_budget_and_has_rows_for_its_processes(
    recipe: str, stage: str
) -> None:
    for engine in ("fsdp2", "deepspeed-zero3"):
        spread = f"{stage}.distributed={engine}"
        planned = plan(recipe, "fp8", HOSTS["what some give to CUDA"], "sequential", spread)
        assert planned.outcome is Outcome.PASS
        assert 0 < planned.peak.bytes <= BUDGET
        spec = spec_of(recipe, spread).model_dump(mode="json")
        assert check_hosts(stage, spec, 2) == 1
    with pytest.raises(RefusedError, match=f"{stage}"):
        check_hosts(
            stage, spec_of(recipe, spread, f"{stage}.batch_size=1", f"{stage}.micro_batch_size=1").model_dump(), 2
        )


def test_the_budget_refuses_the_same_recipe_with_more_in_flight_or_the_teacher_beside_the_student() -> None:
    host = HOSTS["all of it"]
    assert plan("gb10-1.7b", "fp8", host, "concurrent").outcome is Outcome.FAIL
    crowded = plan("gb10-1.7b", "fp8", host, "sequential", "distill.micro_batch_size=32")
    assert crowded.outcome is Outcome.FAIL
    live = "distill.targets=live"
    plans = {mode: plan("gb10-1.7b", "fp8", host, mode, live) for mode in MODES}
    asked = mode_of(spec_of("gb10-1.7b", live))
    with pytest.raises(RefusedError, match="does not fit"):
        choose_mode(asked, plans)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gb10_recipe_makes_its_runs(recipe: str) -> None:
    check_profile(spec_of(recipe))


@pytest.mark.parametrize("recipe", sorted(STUDENTS))
def test_a_full_recipe_goes_through_its_data_twice_and_keeps_checkpoints_on_the_way(recipe: str) -> None:
    spec = spec_of(recipe)
    assert spec.distill.steps * spec.distill.batch_size == 2 * spec.data.train_sequences
    assert spec.distill.steps % spec.distill.checkpoint_every == 0
    assert spec.profile == "full"
