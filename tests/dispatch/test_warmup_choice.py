"""The kernels' warm-up as a step of a plan: once for a build and a machine, never repeated by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dispatch.building.build import choose_build
from dispatch.building.warmup import WarmUp, choose_warmup, kernels, warmup_identity, warmup_kin
from dispatch.hosts.facts import HostFacts
from dispatch.hosts.inventory import Host, PinnedKey
from dispatch.planning.ask import Ask, asked

_KEY = PinnedKey(type="ssh-ed25519", sha256="SHA256:" + "Q" * 43, date="2026-11-09")
_GPU = {"name": "NVIDIA GB10", "compute_cap": "12.1", "driver_version": "580.95"}


@pytest.fixture(scope="module")
def ask(checkout: Any) -> Ask:
    return asked("tiny", Host(name="box", root="/r", keys=(_KEY,)), env={}, folder=checkout)


def _facts(kin_runs: dict[str, Any] | None = None, **host: Any) -> HostFacts:
    machine = {"hostname": "h", "arch": "aarch64", **host}
    python = {"executable": "/usr/bin/python3", "version": "3.12.3"}
    return HostFacts.model_validate({"host": machine, "python": python, "root": "/r", "kin_runs": kin_runs or {}})


def _choice(ask: Ask, facts: HostFacts, *, wanted: bool = True) -> WarmUp:
    return choose_warmup(ask, facts, choose_build(ask, facts, wanted=True), wanted=wanted)


def test_a_machine_with_gpus_proves_every_kernel_one_without_what_its_pipeline_calls(ask: Ask) -> None:
    gpu, cpu = _choice(ask, _facts(gpus=[_GPU], driver="580.95")), _choice(ask, _facts())
    assert (gpu.will, gpu.argv("/v/python")[1:]) == ("run", ["-P", "-m", "latentforge", "kernels", "warmup"])
    assert cpu.argv("/v/python")[-2:] == ["--only", "cpu/kd_loss.fp32.topk.forward"]
    assert gpu.run != cpu.run


@pytest.mark.parametrize("recipe", ["tiny", "tiny-autoencoder", "tiny-latent"])
def test_the_kernels_that_a_plan_names_are_the_guards(checkout: Any, recipe: str) -> None:
    from latentforge.kernels.guard.table import table
    from latentforge.kernels.guard.warmup import Limits, look_in_child

    names = {variant.name for variant in table(look_in_child(Limits()))}
    ask = asked(recipe, Host(name="box", root="/r", keys=(_KEY,)), env={}, folder=checkout)
    named = kernels(ask, _facts().host)
    assert named
    assert set(named) <= names


def test_another_driver_is_another_warm_up_and_another_day_is_not(ask: Ask) -> None:
    runs = {
        warmup_identity(ask, _facts(gpus=[{**_GPU, "utilization.gpu": busy}], driver=driver).host).run_id
        for driver, busy in (("580.95", 0.0), ("580.95", 97.0), ("590.10", 0.0))
    }
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("state", "outcome", "will"),
    [
        ("finished", "pass", "keep"),
        ("running", None, "follow"),
        ("finished", "fail", "ended"),
        ("lost", "unknown", "ended"),
        ("reserved", None, "run"),
    ],
)
def test_what_is_there_decides_and_a_failed_one_is_repeated_only_when_asked(
    ask: Ask, state: str, outcome: str | None, will: str
) -> None:
    first = warmup_identity(ask, _facts().host)
    there = {warmup_kin(ask): [{"id": first.run_id, "state": state, "outcome": outcome, "attempt": 1, "ended": 1.0}]}
    found = _choice(ask, _facts(there))
    assert (found.will, found.run) == (will, first.run_id)
    again = _choice(replace(ask, attempt_next=True), _facts(there))
    assert again.again is (will == "ended")
    if again.again:
        assert again.run == first.at_attempt(2).run_id


def test_where_nothing_is_to_run_nothing_is_proven(ask: Ask) -> None:
    assert _choice(ask, _facts(), wanted=False).will == "keep"
