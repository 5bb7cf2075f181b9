"""Compiling a kernel without a launch and without a GPU, and looking at the machine code that came out.

Each variant is compiled for one architecture in a process that does not interpret Triton. Triton assembles for
``sm_121a`` and so on: the code of sm_120 does not run on sm_121.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from latentforge.errors import RefusedError
from latentforge.kernels.triton import interpreted, require
from latentforge.kernels.triton.configs import CANDIDATES, DECODE_CANDIDATES, STATIC, Config, DecodeConfig, decode_tile
from latentforge.kernels.triton.decode import PICK_BLOCK, PICK_LAUNCH, PIECE, SMALL_LAUNCH

# What a block may have on each architecture, in bytes; opt-in, as Triton asks for it.
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376, 121: 101376}


@dataclass(frozen=True)
class Ahead:
    """One kernel with everything that makes it another piece of machine code.

    ``pointers`` are the tensors that it is given with their Triton types; those not named are None. ``switches`` are
    its compile-time arguments and ``options`` the compiler's.
    """

    kernel: str
    pointers: tuple[tuple[str, str], ...]
    switches: tuple[tuple[str, int | bool], ...]
    options: tuple[tuple[str, int | bool], ...]

    def __str__(self) -> str:
        types = ",".join(kind.lstrip("*") for _, kind in self.pointers)
        said = ",".join(name if value is True else f"{name}={value}" for name, value in self.switches if value)
        return f"{self.kernel}[{types}][{said}]"


@dataclass(frozen=True)
class CompiledReport:
    """What the compiler made: registers a thread, bytes of stack (spills) a thread, bytes of shared memory a block."""

    name: str
    arch: int
    targets: tuple[str, ...]
    registers: int
    spill_bytes: int
    shared_bytes: int
    ptxas: str
    ptxas_version: str
    seconds: float


def problems(report: CompiledReport) -> list[str]:
    """What is wrong with the code: what makes it unfit for its architecture, and spills; empty where nothing is."""
    found = unfit(report)
    if report.spill_bytes:
        found.append(f"{report.spill_bytes} bytes of registers spilt a thread")
    return found


def unfit(report: CompiledReport) -> list[str]:
    """Why the code cannot run on its architecture; a spill costs time, which the guard measures."""
    found = []
    wanted = f"sm_{report.arch}a" if report.arch >= 90 else f"sm_{report.arch}"
    if report.targets != (wanted,):
        found.append(f"machine code for {', '.join(report.targets) or 'nothing'}, not for {wanted} alone")
    limit = SHARED_BYTES[report.arch]
    if report.shared_bytes > limit:
        found.append(f"{report.shared_bytes} bytes of shared memory a block; sm_{report.arch} has {limit}")
    return found


def compile_ahead(variant: Ahead, arch: int = 121) -> CompiledReport:
    """Compile ``variant`` for compute capability ``arch`` (121 is 12.1), and read what is in the code.

    RefusedError where Triton is missing or interprets, or the architecture is none that is known here.
    """
    if interpreted():
        raise RefusedError("TRITON_INTERPRET=1: this process interprets kernels", next="unset it to compile them")
    if arch not in SHARED_BYTES:
        raise RefusedError(f"arch {arch} is not one of {', '.join(map(str, SHARED_BYTES))}")
    homes = {"decode_split": "decode_kernels", "decode_join": "decode_kernels", "decode_pick": "decode_pick"}
    function = getattr(require(homes.get(variant.kernel, variant.kernel)), variant.kernel)

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given, constants = dict(variant.pointers), dict(variant.switches)
    integers = set(function.do_not_specialize or ())
    aligned_only = set(function.do_not_specialize_on_alignment or ())
    signature, values = {}, {}
    for name in function.arg_names:
        if name in given:
            signature[name] = given[name]
        elif name in constants or name in aligned_only:
            signature[name] = "constexpr"
            values[name] = constants.get(name)
        else:
            signature[name] = "i32" if name in integers else "fp32"
    began = time.perf_counter()
    source = ASTSource(fn=function, signature=signature, constexprs=values)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(variant.options))
    seconds = time.perf_counter() - began
    targets, registers, spilt = _read(made.asm["cubin"])
    path, version = _ptxas(arch)
    return CompiledReport(
        str(variant), arch, targets, registers, spilt, int(made.metadata.shared), path, version, seconds
    )


def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _read(cubin: bytes) -> tuple[tuple[str, ...], int, int]:
    """(architectures, registers, bytes of stack and local memory) of machine code."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        ask = [str(_tools() / "cuobjdump")]
        listed = subprocess.run([*ask, "--list-elf", str(file)], capture_output=True, text=True, check=True).stdout
        used = subprocess.run([*ask, "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    return read_listings(listed, used)


def read_listings(listed: str, used: str) -> tuple[tuple[str, ...], int, int]:
    """The same from what ``cuobjdump --list-elf`` and ``-res-usage`` print; RefusedError where that says nothing."""
    targets = tuple(sorted(set(re.findall(r"\b(sm_\d+[a-z]?)\b", listed))))
    usage = re.findall(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", used)
    if not targets or not usage:
        raise RefusedError(f"cuobjdump lists no kernel: {(listed + used).strip()[:200]!r}")
    return (
        targets,
        max(int(registers) for registers, _, _ in usage),
        max(int(stack) + int(local) for _, stack, local in usage),
    )


def _ptxas(arch: int) -> tuple[str, str]:
    """The assembler's path and version, as Triton chooses it."""
    from triton.backends.nvidia.compiler import get_ptxas

    try:
        tool = get_ptxas(arch)
    except TypeError:  # Triton before 3.6 had one assembler for every architecture
        tool = get_ptxas()
    return str(tool.path), str(tool.version)


TYPES = {"bf16": "*bf16", "fp32": "*fp32"}


def kd_variant(
    dtype: str,
    targets: str,
    direction: str,
    *,
    teacher: str | None = None,
    bias: bool = False,
    shaping: bool = False,
    root: int = 2,
    write: bool = True,
    aligned: bool = True,
    config: Config | None = None,
) -> Ahead:
    """``kd_loss`` of ``dtype`` logits with ``targets`` dense, topk or none; ``root`` as in ``logits.at_one``."""
    kernel = "kd_topk" if targets == "topk" else "kd_dense"
    config = config or STATIC[kernel][None]
    pointers = {"student": TYPES[dtype], "labels": "*i64", "ce_out": "*fp32", "kd_out": "*fp32"}
    if targets == "dense":
        pointers["teacher"] = TYPES[teacher or dtype]
    elif targets == "topk":
        pointers |= {"ids": "*i32", "logprobs": "*fp32", "tail": "*fp32", "saved": "*fp32"}
        pointers |= {} if write else {"marks": "*i32"}
    if bias:
        pointers["bias"] = TYPES[dtype]
    switches: dict[str, int | bool] = {
        "REVERSE": direction == "reverse",
        "ROOT": root,
        "SCALED": shaping,
        "CAPPED": shaping,
        "WRITE": write,
        "ALIGNED": aligned,
    }
    if targets == "topk":
        switches["PIECE"] = 128
    return _with_launch(kernel, pointers, switches, config)


def decode_variant(
    hidden: str,
    weight: str,
    *,
    drawn: bool = True,
    kept: bool = False,
    bias: bool = False,
    shaping: bool = False,
    aligned: bool = True,
    config: DecodeConfig | None = None,
) -> Ahead:
    """The product of ``latent_decode`` for ``hidden`` bf16 or fp32 and ``weight`` bf16, fp32 or int8."""
    config = config or decode_tile("fp32" in (hidden, weight), aligned)
    pointers = {"hidden": TYPES[hidden], "weight": TYPES.get(weight, "*i8"), "sums": "*fp32", "tokens": "*i32"}
    if weight == "int8":
        pointers["scales"] = "*fp32"
    if drawn:
        pointers |= {"seeds": "*i64", "positions": "*i64"}
    if kept:
        pointers["logits"] = "*fp32"
    if bias:
        pointers["bias"] = "*fp32"
    return _with_launch("decode_split", pointers, {"SCALED": shaping, "CAPPED": shaping, "ALIGNED": aligned}, config)


def _with_launch(
    kernel: str, pointers: dict[str, str], switches: dict[str, int | bool], config: Config | DecodeConfig
) -> Ahead:
    launch = config.launch()
    options = {name: value for name, value in launch.items() if not name.isupper()}
    switches |= {name: value for name, value in launch.items() if name not in options}
    return Ahead(kernel, tuple(pointers.items()), tuple(switches.items()), tuple(options.items()))


def variants() -> Iterator[Ahead]:
    """Each kernel by precision, kind of targets and direction with its tile of the table, and each switch once."""
    for dtype, targets, direction in product(("bf16", "fp32"), ("dense", "topk"), ("forward", "reverse")):
        yield kd_variant(dtype, targets, direction)
    for dtype, targets, direction in (
        ("bf16", "dense", "forward"),
        ("bf16", "topk", "forward"),
        ("fp32", "dense", "reverse"),
    ):
        yield kd_variant(dtype, targets, direction, write=False)
        yield kd_variant(dtype, targets, direction, bias=True, shaping=True, root=0)
    for student, teacher in (("bf16", "fp32"), ("fp32", "bf16")):
        yield kd_variant(student, "dense", "forward", teacher=teacher, aligned=False)
    yield kd_variant("bf16", "none", "forward", root=1)
    for hidden, weight in product(("bf16", "fp32"), ("bf16", "fp32", "int8")):
        yield decode_variant(hidden, weight)
    yield decode_variant("bf16", "bf16", drawn=False, bias=True, shaping=True)
    yield decode_variant("bf16", "int8", kept=True, aligned=False)
    yield Ahead(
        "decode_join",
        (("sums", "*fp32"), ("tokens", "*i32"), ("ids", "*i64"), ("logprobs", "*fp32")),
        (("PIECE", PIECE),),
        tuple(SMALL_LAUNCH.items()),
    )
    pointers = {"logits": "*fp32", "seeds": "*i64", "positions": "*i64", "sums": "*fp32", "tokens": "*i32"}
    pointers |= {"ids": "*i64", "logprobs": "*fp32"}
    switches = (("CUT_P", True), ("BLOCK", PICK_BLOCK), ("PIECE", PIECE))
    yield Ahead("decode_pick", tuple(pointers.items()), switches, tuple(PICK_LAUNCH.items()))


def combinations() -> Iterator[Ahead]:
    """Every combination of what variants() has once; many minutes of compiling."""
    flags = (False, True)
    for dtype, targets, direction in product(("bf16", "fp32"), ("dense", "topk"), ("forward", "reverse")):
        for bias, shaping, root, write, aligned in product(flags, flags, (0, 1, 2, 4), flags, flags):
            yield kd_variant(
                dtype, targets, direction, bias=bias, shaping=shaping, root=root, write=write, aligned=aligned
            )
    for hidden, weight in product(("bf16", "fp32"), ("bf16", "fp32", "int8")):
        for drawn, kept, bias, shaping, aligned in product(flags, repeat=5):
            if drawn or not kept:
                yield decode_variant(
                    hidden, weight, drawn=drawn, kept=kept, bias=bias, shaping=shaping, aligned=aligned
                )


def candidates() -> Iterator[Ahead]:
    """The tiles worth measuring beside the table's."""
    for kernel, configs in CANDIDATES.items():
        for config in configs:
            yield kd_variant("bf16", kernel.removeprefix("kd_"), "forward", config=config)
            yield kd_variant("fp32", kernel.removeprefix("kd_"), "forward", config=config)
    for full, tiles in DECODE_CANDIDATES.items():
        for tile in tiles:
            yield decode_variant("fp32" if full else "bf16", "fp32" if full else "bf16", config=tile)
            if not full:
                yield decode_variant("bf16", "int8", config=tile)


def compile_for_guard(variant: Any, capability: tuple[int, int]) -> dict[str, object]:
    """Compile what a variant of the warm-up guard stands for; its largest numbers, RefusedError where unfit."""
    arch = capability[0] * 10 + capability[1]
    if variant.op == "kd_loss":
        wanted = [kd_variant(variant.dtype, variant.targets, variant.direction, write=write) for write in (True, False)]
    else:
        weight = "int8" if variant.targets == "int8" else variant.dtype
        wanted = [decode_variant(variant.dtype, weight, drawn=drawn) for drawn in (True, False)]
    reports = [compile_ahead(one, arch) for one in wanted]
    wrong = [f"{report.name}: {said}" for report in reports for said in unfit(report)]
    if wrong:
        raise RefusedError("; ".join(wrong))
    largest = max(reports, key=lambda report: report.registers)
    return asdict(largest) | {
        "shared_bytes": max(report.shared_bytes for report in reports),
        "spill_bytes": max(report.spill_bytes for report in reports),
        "seconds": sum(report.seconds for report in reports),
    }
