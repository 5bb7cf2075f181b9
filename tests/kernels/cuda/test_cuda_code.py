"""Every CUDA kernel has machine code for every architecture, spills nothing and fits the smallest shared memory."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from latentforge.kernels.native import native

ARCHITECTURES = ("sm_89", "sm_90", "sm_120", "sm_121")
SHARED_BYTES = 99 * 1024  # a block of sm_121


def resources(report: str) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, architecture) → registers, spilled bytes, stack, shared memory, out of ``ptxas -v``."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    entry = r"Compiling entry function '(\w+)' for '(\w+)'"
    for part in re.split(rf"(?={entry})", report):
        named = re.match(entry, part)
        if named is None:
            continue
        stack, stores, loads = (
            int(n)
            for n in re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part).groups()  # type: ignore[union-attr]
        )
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert registers is not None, part
        found[named[1], named[2]] = {
            "registers": int(registers[1]),
            "stack": stack,
            "spilled": stores + loads,
            "shared": int(shared[1]) if shared else 0,
        }
    return found


def unfit(report: str) -> list[str]:
    """What is wrong with the kernels of a report: missing for an architecture, spilling, too large."""
    found = resources(report)
    kernels = sorted({kernel for kernel, _ in found})
    wrong = [] if kernels else ["no kernel at all"]
    for kernel in kernels:
        for architecture in ARCHITECTURES:
            numbers = found.get((kernel, architecture))
            if numbers is None:
                wrong.append(f"{kernel}: no machine code for {architecture}")
            elif numbers["spilled"] or numbers["stack"]:
                wrong.append(f"{kernel} {architecture}: spills {numbers['spilled']} bytes, stack {numbers['stack']}")
            elif numbers["shared"] > SHARED_BYTES:
                wrong.append(f"{kernel} {architecture}: {numbers['shared']} bytes of shared memory")
    return wrong


def cuobjdump() -> str:
    """The lister of embedded code: of the pip package, or the one that Triton carries."""
    folders = [Path(p) / "cu13" / "bin" for p in getattr(find_spec("nvidia"), "submodule_search_locations", None) or []]
    triton = find_spec("triton")
    if triton is not None and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for folder in folders:
        if (folder / "cuobjdump").is_file():
            return str(folder / "cuobjdump")
    found = shutil.which("cuobjdump")
    assert found, "no cuobjdump: pip install -r constraints/cuda-build.txt"
    return found


def embedded(listing: str) -> list[str]:
    """Architectures of the machine code in a listing (``cuobjdump --list-elf``)."""
    return re.findall(r"ELF file\s+\d+: \S*?\.(sm_\w+)\.cubin", listing)


def lacking(listing: str) -> list[str]:
    return [a for a in ARCHITECTURES if a not in embedded(listing)]


def test_no_kernel_spills_and_all_fit_every_architecture() -> None:
    report = native().cuda_resources()
    assert not unfit(report), "\n".join(unfit(report))
    assert len({kernel for kernel, _ in resources(report)}) >= 8


def test_the_module_carries_machine_code_for_every_architecture_and_leans_on_no_ptx() -> None:
    listing = subprocess.run([cuobjdump(), "--list-elf", native().__file__], capture_output=True, text=True, check=True)
    assert not lacking(listing.stdout), listing.stdout
    ptx = subprocess.run([cuobjdump(), "--list-ptx", native().__file__], capture_output=True, text=True)
    assert "PTX file" not in ptx.stdout, "PTX would be compiled by the driver, in a training step"
    per = {a: embedded(listing.stdout).count(a) for a in ARCHITECTURES}
    assert len(set(per.values())) == 1, f"an architecture lacks a file that others have: {per}"


def test_a_listing_without_sm_121_is_refused() -> None:
    listing = "ELF file    1: tmp.1.sm_89.cubin\nELF file    2: tmp.2.sm_90.cubin\nELF file    3: tmp.3.sm_120.cubin\n"
    assert lacking(listing) == ["sm_121"]
    assert lacking(listing + "ELF file    4: tmp.4.sm_121a.cubin\n") == ["sm_121"]
    assert not lacking(listing + "ELF file    4: tmp.4.sm_121.cubin\n")


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) planted(const float *in, float *out) {
  float x[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) x[i] = in[threadIdx.x + 1024 * i];
#pragma unroll 1
  for (int turn = 0; turn < 9; ++turn)
#pragma unroll
    for (int i = 0; i < 96; ++i) x[i] = x[i] * x[(i * 7 + 1) % 96] + turn;
#pragma unroll
  for (int i = 0; i < 96; ++i) out[threadIdx.x + 1024 * i] = x[i];
}
"""


def test_a_kernel_that_spills_or_is_not_there_for_gb10_is_caught(tmp_path: Path) -> None:
    (tmp_path / "planted.cu").write_text(SPILLING)
    root = Path(__file__).resolve().parents[3]
    said = subprocess.run([sys.executable, root / "csrc/cuda/find_nvcc.py"], capture_output=True, text=True).stdout
    assert said, "no CUDA compiler: pip install -r constraints/cuda-build.txt"
    command = [said.split(";")[0], "-Xptxas=-v", "-gencode=arch=compute_121,code=sm_121", "-cubin"]
    command += ["-o", str(tmp_path / "planted.cubin"), str(tmp_path / "planted.cu")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    wrong = unfit(report)
    assert any("sm_121: spills" in line for line in wrong), report
    assert any("no machine code for sm_89" in line for line in wrong)
    assert unfit("") == ["no kernel at all"]


@pytest.mark.parametrize("bytes_", [SHARED_BYTES + 1])
def test_a_block_with_too_much_shared_memory_is_caught(bytes_: int) -> None:
    one = (
        "ptxas info    : Compiling entry function 'k' for '{}'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 40 registers, {} bytes smem\n"
    )
    assert not unfit("".join(one.format(a, 99) for a in ARCHITECTURES))
    assert len(unfit("".join(one.format(a, bytes_) for a in ARCHITECTURES))) == 4
