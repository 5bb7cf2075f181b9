"""A variant of the CUDA backend is loaded, kernel by kernel, before any of it is launched."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import stub

from latentforge.kernels.cuda import extension
from latentforge.kernels.guard import work
from latentforge.kernels.guard.machine import Machine
from latentforge.kernels.guard.records import Record
from latentforge.kernels.guard.report import Report, render
from latentforge.kernels.guard.variants import Variant
from latentforge.kernels.guard.warmup import Line
from latentforge.kernels.native import native

OURS = replace(stub("good", shapes=((2, 33),)), rung="cuda")


def kernel(name: str, **fields: Any) -> dict[str, Any]:
    return {"kernel": name, "registers": 40, "local_bytes": 0, "shared_bytes": 432, "code": "sm_121", **fields}


def probe(variant: Variant, load: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(extension, "native", lambda: SimpleNamespace(cuda_info=dict, cuda_load=load))
    request = {"variant": variant.as_json(), "quick": True}
    return work.probe(request, lambda stage: None)


def test_every_kernel_of_the_operator_is_loaded_and_its_spills_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def load(op: str, device: int) -> list[dict[str, Any]]:
        asked.append((op, device))
        return [kernel("one"), kernel("two", local_bytes=16, registers=80)]

    found = probe(OURS, load, monkeypatch)
    assert found["reason"] is None, found["detail"]
    assert asked == [("kd", 0)]
    assert found["measured"]["loaded"] == {
        "kernels": 2,
        "code": "sm_121",
        "registers": 80,
        "shared_bytes": 432,
        "spill_bytes": 16,
    }
    record = Record(OURS.name, "0", "ok", measured=found["measured"])
    machine = Machine(None, 0, *["none"] * 7)
    assert "spills 16 bytes a thread" in render(Report(machine, [Line(OURS, record, "proven")], []))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("kd_step bf16, top-k: CUDA error 209, no kernel image is available for execution", "no_cubin"),
        (
            "kd_step bf16, top-k: CUDA error 222, the provided PTX was compiled with an unsupported toolchain.",
            "ptx_too_new",
        ),
        ("kd_step bf16, top-k: CUDA error 999, unknown error", "load_error"),
    ],
)
def test_a_kernel_that_is_not_there_fails_the_load_stage_in_the_drivers_words(
    said: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(op: str, device: int) -> list[dict[str, Any]]:
        raise RuntimeError(said)

    found = probe(OURS, load, monkeypatch)
    assert (found["stage"], found["reason"]) == ("load", reason)
    assert said in found["detail"]


def test_the_decoder_loads_its_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        extension,
        "native",
        lambda: SimpleNamespace(cuda_info=dict, cuda_load=lambda op, device: asked.append(op) or [kernel("k")]),
    )
    work._load(replace(OURS, op="latent_decode"), torch.device("cpu"))
    assert asked == ["decode"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a device")
@pytest.mark.parametrize("op", ["kd", "decode"])
def test_without_a_driver_loading_fails_in_the_runtimes_words(op: str) -> None:
    if native().cuda_info() is None:
        pytest.skip("the extension was built without CUDA kernels")
    with pytest.raises(RuntimeError, match="CUDA error"):
        native().cuda_load(op, 0)
    with pytest.raises(ValueError, match="called x"):
        native().cuda_load("x", 0)
