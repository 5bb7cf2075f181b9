"""The public incidents that a preflight must catch, replayed as shapes of our own: each stops a launch, or is told.

D1 … D20 are numbered as in docs/incidents.md; what belongs to building, pulling, the runner or the guard is tested
there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dispatch.hosts.facts import HostFacts
from dispatch.hosts.inventory import Host
from dispatch.planning.ask import asked
from dispatch.preflight.judge import judge
from latentforge.errors import RefusedError
from latentforge.spec.capabilities import missing, wanted_of

Facts = Callable[..., HostFacts]
CHECKOUT = Path(__file__).resolve().parents[2]
GIB = 2**30
GB10: dict[str, str] = json.loads(Path(__file__).with_name("gb10.json").read_text())


def ask_for(host: Host, *overrides: str, **env: str) -> Any:
    return replace(asked("tiny", host, env=env, overrides=overrides, folder=CHECKOUT), unfit=None)


def ended(out: str, code: int = 0) -> dict[str, Any]:
    return {"status": "ended", "code": code, "out": out}


def test_d1_six_flags_that_the_trainer_does_not_have_are_each_named(facts_with: Facts, box: Host) -> None:
    flags = ["--teacher", "--student", "--steps", "--batch-size", "--lr", "--evidence-dir"]
    wanted = {"commands": tuple(f"distill {flag}" for flag in flags)}
    offer = {"commands": ["distill", "distill --config", "distill --epochs"]}
    assert missing(wanted, offer) == [f"command distill {flag}" for flag in flags]
    ask = ask_for(box)
    had = wanted_of(ask.spec)
    old = {**{name: list(names) for name, names in had.items()}, "fields": ["distill.steps"], "version": "0.0.1"}
    found = judge(facts_with(capabilities={"source": "asked", "offered": old}), ask)["capabilities"]
    assert found.stops
    assert "lacks field " in found.measured
    assert " more" in found.measured


def test_d4_a_model_whose_companion_config_is_absent_is_unknown_and_never_enough(
    probe: Any, tmp_path: Path, facts_with: Facts, box: Host
) -> None:
    folder = tmp_path / "model.apr"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    _report, facts = probe("memory", models=[str(folder)])
    model = facts.preflight.models[str(folder)]
    assert model.config is None
    assert "config.json: No such file or directory" in model.reason
    good = facts_with()
    assert good.preflight is not None
    facts = good.model_copy(update={"preflight": good.preflight.model_copy(update={"models": facts.preflight.models})})
    found = judge(facts, ask_for(box, f"teacher.model={folder}"))["memory"]
    assert found.outcome == "unknown"
    assert "No such file" in found.measured


def test_d5_a_run_root_of_another_host_is_told_with_what_would_be_made(probe: Any, host: Host, tmp_path: Path) -> None:
    there = tmp_path / "nvme" / "runs"
    there.parent.mkdir()
    found = probe("root", where=Host(name="local", root=str(there)))[0]["root"]
    assert f"{there} (to be made in {there.parent})" in found.measured
    if os.geteuid() == 0:
        # /proc takes no folders from anybody: the nearest that exists is no place to write.
        found = probe("root", where=Host(name="local", root="/proc/sys/elsewhere/runs"))[0]["root"]
        assert found.outcome == "fail"
        assert found.remedy


def test_d6_a_binary_that_does_not_say_what_it_can_do_is_refused_with_its_own_words(
    facts_with: Facts, box: Host
) -> None:
    said = {"source": "asked", "offered": None, "status": "ended", "code": 2, "said": "error: unrecognized subcommand"}
    found = judge(facts_with(capabilities=said), ask_for(box))["capabilities"]
    assert found.stops
    assert "status 2: error: unrecognized subcommand" in found.measured


def test_d7_a_step_count_with_a_letter_in_it_is_refused_and_never_the_full_run(box: Host) -> None:
    with pytest.raises(RefusedError, match="STEPS='1O' is not a whole number"):
        asked("tiny", box, env={"STEPS": "1O"}, folder=CHECKOUT)


def test_d10_98_percent_of_a_disk_used_is_refused_by_the_file_system_of_the_run(facts_with: Facts, box: Host) -> None:
    ask = ask_for(box, "score.k=300", "data.train_sequences=300000", "data.sequence_length=256")
    facts = facts_with(storage={"bytes_free": 21 * GIB, "base": "/data"})
    found = judge(facts, ask)["disk"]
    assert found.stops
    assert "21.0 GiB free in /data on box" in found.measured
    assert "targets 129.6" in found.measured
    # The home folder's free space (the plain fact) is not what counts.
    assert facts.host.disk_free == 900 * GIB


def test_d13_scratch_sized_by_all_positions_is_refused_before_the_launch(facts_with: Facts, box: Host) -> None:
    from dispatch.preflight.facts import Model

    config = {"model_type": "qwen2", "vocab_size": 151_936, "num_hidden_layers": 24, "hidden_size": 896}
    config |= {"num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864}
    facts = facts_with(machine={"mem_total": 128 * 10**9, "mem_available": 120 * 10**9})
    assert facts.preflight is not None
    models = {"/m": Model(config=config, bytes=1 << 30)}
    facts = facts.model_copy(update={"preflight": facts.preflight.model_copy(update={"models": models})})
    short = ("teacher.model=/m", "score.batch_size=1", "distill.batch_size=1")
    found = judge(facts, ask_for(box, *short, "data.sequence_length=32768"))["memory"]
    assert found.stops
    assert "60.1 GB a sequence and block, 24 blocks" in found.measured
    assert judge(facts, ask_for(box, *short, "data.sequence_length=2048"))["memory"].outcome == "pass"


def test_d14_a_device_window_of_30_of_128_gb_is_told_without_allocating_anything(
    gb10: Any, probe: Any, facts_with: Facts, box: Host, tmp_path: Path
) -> None:
    from dispatch.agent.preflight_actions import _TORCH

    said = {"torch": "2.11.0+cu130", "cuda": "13.0", "arches": ["sm_120"], "mean": 1.0, "total": 1 << 30}
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{json.dumps(said)}'\n")
    python.chmod(0o755)
    found = probe("window", python=str(python))[0]["window"]
    assert (found.outcome, "1.0 GiB of the host's" in found.measured) == ("fail", True), found
    assert "total_memory" in _TORCH
    assert "empty(" not in _TORCH

    # Enough of the host, and still less than the plan's own peak.
    did = {"torch": {"status": "ended", "code": 0, "answer": {**said, "total": 100 * GIB}, "said": ""}}
    ask = ask_for(box, "data.sequence_length=16384", "distill.batch_size=4", "distill.student.heads=16",
                  "distill.student.hidden=64", "data.train_sequences=8")  # fmt: skip
    assert judge(facts_with(did=did), box, asked=["window"])["window"].outcome == "pass"
    assert judge(facts_with(did=did), ask, asked=["window"])["window"].outcome == "fail"


def test_d19_a_server_that_sat_66_hours_is_seen_though_memory_is_na_and_the_list_is_empty(
    facts_with: Facts, box: Host
) -> None:
    server = {"pid": 3110, "owner": "bob", "age": 66 * 3600.0, "command": "llama-server -m x", "name": "llama-server"}
    facts = facts_with(tenants={"processes": [{**server, "why": ["is a model server"]}]})
    assert GB10["memory.used"] == "[N/A]"
    found = judge(facts, box)["tenants"]
    assert found.stops
    assert "pid 3110 of bob, for 3 d: llama-server -m x" in found.measured


def test_d19_an_empty_list_and_a_busy_gpu_is_unknown_not_idle(facts_with: Facts, box: Host) -> None:
    busy = ", ".join({**GB10, "utilization.gpu": "96", "power.draw": "19.20"}.values())
    facts = facts_with(commands={"gpu": ended(busy), "apps": ended("")})
    assert judge(facts, box)["tenants"].outcome == "unknown"


def test_d20_green_on_another_architecture_says_nothing_of_this_one(facts_with: Facts, box: Host) -> None:
    ada = ", ".join({**GB10, "name": "NVIDIA GeForce RTX 4090", "compute_cap": "8.9"}.values())
    found = judge(facts_with(commands={"gpu": ended(ada)}), box)
    assert found["gpu"].stops
    assert "compute capability 8.9" in found["gpu"].measured
    lane = {"own": [{"path": "/v/_native.so", "elf": ["ELF file 1: a.1.sm_89.cubin"], "ptx": []}]}
    assert judge(facts_with(binaries=lane), box)["binaries"].outcome == "fail"
    plain = box.model_copy(update={"gb10": False})
    other = judge(
        facts_with(machine={"gpus": [{"name": "NVIDIA GeForce RTX 4090"}]}, commands={"gpu": ended(ada)}), plain
    )
    assert other["binaries"].outcome == "n/a"


def test_a_gpu_in_its_low_power_state_is_told_from_a_healthy_one_by_rate_and_clock(
    facts_with: Facts, box: Host
) -> None:
    def power(rate: float, row: str) -> str:
        did = {"power": {"answer": {"tflops": rate}, "samples": [row] * 20}}
        return judge(facts_with(did=did), box, asked=("power",))["power"].outcome

    assert power(36.5, "799, 19.5, 96, 50") == "fail"
    assert power(91.6, "2281, 92.5, 97, 80") == "pass"
