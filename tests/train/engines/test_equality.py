"""A student that several processes train together is the one that a single process trains."""

from __future__ import annotations

from typing import Any

import pytest

from latentforge.train.engines.checks import OF_DEEPSPEED, OF_TORCH, RECOMPUTED, UNTIED, table
from latentforge.train.engines.equality import TOLERANCE
from latentforge.train.engines.protocol import Wrapped

from ...claims import claims_of, require_claim

pytestmark = pytest.mark.slow
WHOLE, HALF = 1.0, 0.5
SHARES = {
    "ddp": ("DistributedDataParallel", WHOLE, WHOLE),
    "fsdp2": ("FSDPStudent", HALF, HALF),
    "deepspeed-zero2": ("DeepSpeedEngine/DeepSpeedZeroOptimizer", WHOLE, HALF),
    "deepspeed-zero3": ("DeepSpeedEngine/DeepSpeedZeroOptimizer_Stage3", HALF, HALF),
}


@pytest.mark.parametrize("engine", OF_TORCH + OF_DEEPSPEED)
def test_two_processes_train_what_one_does_in_one_pass_or_many(engine: Any) -> None:
    for way in ("1x8", "8x1"):
        found = table()[engine, way, None]
        assert found.loss <= TOLERANCE, way
        assert found.norm <= TOLERANCE, way
        wrapper, weights, states = SHARES[engine]
        assert (found.wrapped["engine"], found.wrapped["wrapper"]) == (engine, wrapper)
        assert found.wrapped["weights"] / found.wrapped["parameters"] == pytest.approx(weights, abs=0.01)
        assert found.wrapped["states"] / found.wrapped["parameters"] == pytest.approx(states, abs=0.01)


@pytest.mark.parametrize("falsifier_id", [name for name, _ in claims_of("train.engines.test_equality")])
def test_the_claim_holds_and_its_control_is_seen_failing(falsifier_id: str) -> None:
    require_claim(falsifier_id)


@pytest.mark.parametrize("engine", OF_TORCH + OF_DEEPSPEED)
def test_a_second_division_is_seen(engine: Any) -> None:
    assert table()[engine, "1x8", "divided-twice"].norm == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("engine", OF_TORCH + OF_DEEPSPEED)
def test_one_process_under_an_engine_trains_what_it_does_without(engine: Any) -> None:
    for way in ("1x8", "8x1"):
        found = table(1)[engine, way, None]
        assert max(found.loss, found.norm) <= TOLERANCE, way


def test_a_head_of_its_own_is_sharded_and_trained_alike() -> None:
    found = table()["fsdp2", UNTIED, None]
    assert max(found.loss, found.norm) <= TOLERANCE
    assert found.wrapped["weights"] < 0.51 * found.wrapped["parameters"]


@pytest.mark.parametrize("engine", OF_TORCH + OF_DEEPSPEED)
def test_activations_that_are_computed_again_change_nothing_under_an_engine(engine: Any) -> None:
    found = table()[engine, RECOMPUTED, None]
    assert max(found.loss, found.norm) <= TOLERANCE


def test_a_share_that_is_too_large_is_refused() -> None:
    whole = Wrapped("fsdp2", "FSDPStudent", 2, 100, 100, 50)
    with pytest.raises(Exception, match="holds 100 numbers of the weights, and at most 54 of 100 are its own"):
        whole.require("fsdp2", wrapper="FSDPStudent", sharded=True, states_sharded=True, largest=4)
    fallen = Wrapped("none", "Student", 1, 100, 100, 100)
    with pytest.raises(Exception, match="made none with Student"):
        fallen.require("ddp", wrapper="DistributedDataParallel", sharded=False, states_sharded=False, largest=0)
