"""The Triton kernels as machine code for sm_121, compiled here without a GPU."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from latentforge.errors import RefusedError
from latentforge.kernels.guard.table import table
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.triton import ahead, kd, require
from latentforge.kernels.triton.ahead import Ahead, CompiledReport, compile_ahead, problems, read_listings
from latentforge.kernels.triton.configs import Config

EVERY = {str(variant): variant for variant in ahead.variants()}
TILES = {f"{number} {variant}": variant for number, variant in enumerate(ahead.candidates())}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What an earlier run had compiled would prove nothing about this one.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_variant_is_machine_code_of_sm_121_without_spills(name: str) -> None:
    report = compile_ahead(EVERY[name])
    assert problems(report) == []
    assert report.targets == ("sm_121a",)
    assert 16 <= report.registers <= 255
    assert report.shared_bytes <= 101376


@pytest.mark.soak
def test_every_combination_of_switches_fits() -> None:
    wrong = {str(variant): problems(compile_ahead(variant)) for variant in ahead.combinations()}
    assert {name: said for name, said in wrong.items() if said} == {}


@pytest.mark.soak
@pytest.mark.parametrize("name", TILES)
def test_every_tile_worth_measuring_fits(name: str) -> None:
    assert problems(compile_ahead(TILES[name])) == []


@pytest.mark.parametrize("arch", [86, 89, 90, 120])
def test_other_architectures_get_code_of_their_own(arch: int) -> None:
    report = compile_ahead(ahead.kd_variant("bf16", "dense", "forward"), arch)
    assert [target.rstrip("a") for target in report.targets] == [f"sm_{arch}"]
    assert report.spill_bytes == 0


def test_planted_spills_are_found() -> None:
    starved = ahead.kd_variant("bf16", "dense", "forward", config=Config(4096, 4, registers=32))
    assert any("spilt" in said for said in problems(compile_ahead(starved)))


def test_a_tile_with_too_much_shared_memory_is_found() -> None:
    large = ahead.decode_variant("bf16", "bf16", config=ahead.DecodeConfig(256, 128, 4, 8, 3))
    assert any("shared memory" in said for said in problems(compile_ahead(large)))


def test_code_of_another_architecture_is_found() -> None:
    report = compile_ahead(ahead.kd_variant("bf16", "none", "forward", root=1), 120)
    assert problems(report) == []
    assert any("not for sm_121a alone" in said for said in problems(replace(report, arch=121)))


LISTED = "ELF file    1: kernel.1.sm_121a.cubin\n"
USED = " Function kd_dense:\n  REG:98 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:1000 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
FIT = CompiledReport("planted", 121, ("sm_121a",), 98, 0, 32, "ptxas", "13.4", 0.1)


@pytest.mark.parametrize(
    ("listed", "used", "found"),
    [
        (LISTED, USED, None),
        (LISTED.replace("121a", "120a"), USED, "machine code for sm_120a"),
        (LISTED.replace("121a", "121"), USED, "machine code for sm_121,"),
        (LISTED + LISTED.replace("121a", "90"), USED, "sm_121a, sm_90"),
        (LISTED, USED.replace("STACK:0", "STACK:24"), "24 bytes of registers spilt"),
        (LISTED, USED + USED.replace("LOCAL:0", "LOCAL:16"), "16 bytes of registers spilt"),
    ],
)
def test_planted_listings_are_read_as_they_are(listed: str, used: str, found: str | None) -> None:
    targets, registers, spilt = read_listings(listed, used)
    said = problems(replace(FIT, targets=targets, registers=registers, spill_bytes=spilt))
    assert (said == []) if found is None else (found in said[0])


def test_a_listing_without_a_kernel_is_refused() -> None:
    with pytest.raises(RefusedError, match="lists no kernel"):
        read_listings("", "cuobjdump info: no device code")


def test_the_noise_is_compiled_without_fused_multiply_adds() -> None:
    # A fused one would round once where the definition rounds twice, and the bits would differ.
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = require("noise").noise
    signature = dict.fromkeys(("seeds", "positions"), "*i64") | {"ids": "*i32", "out": "*fp32", "count": "i32"}
    source = ASTSource(fn=kernel, signature=signature | {"BLOCK": "constexpr"}, constexprs={"BLOCK": 256})
    target = GPUTarget("cuda", 121, 32)
    assert "fma.rn.f32" not in compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
    assert all(
        dict(variant.options)["enable_fp_fusion"] is False
        for variant in EVERY.values()
        if variant.kernel in ("decode_split", "decode_pick")
    )


@pytest.mark.slow
def test_the_warm_up_guard_compiles_what_it_is_going_to_prove() -> None:
    machine = SimpleNamespace(capability=(12, 1), triton="3.9.0")
    ours = [variant for variant in table(machine) if variant.rung == "triton"]  # type: ignore[arg-type]
    assert {variant.op for variant in ours} == {"kd_loss", "latent_decode"}
    assert {variant.compile for variant in ours} == {"latentforge.kernels.triton.ahead:compile_for_guard"}
    for variant in (ours[0], ours[-1]):
        found = ahead.compile_for_guard(variant, (12, 1))
        assert found["targets"] == ("sm_121a",)
        assert found["spill_bytes"] == 0


def test_a_process_that_interprets_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RefusedError, match="TRITON_INTERPRET=1"):
        compile_ahead(Ahead("kd_dense", (), (), ()))


def test_without_triton_the_package_imports_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    monkeypatch.delitem(__import__("sys").modules, "latentforge.kernels.triton.kd_dense", raising=False)
    monkeypatch.delitem(__import__("sys").modules, "latentforge.kernels.triton.logits", raising=False)
    importlib.import_module("latentforge.kernels.triton")
    with pytest.raises(RefusedError, match="Triton cannot be imported") as refused:
        kd.row_losses(torch.zeros(2, 3), None, None, KDSettings(1.0, 1.0))
    assert "latentforge[triton]" in str(refused.value.next)
