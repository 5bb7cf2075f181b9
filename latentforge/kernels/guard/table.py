"""Which variants there are on a machine: operator by precision, targets and direction, on every rung of the ladder."""

from __future__ import annotations

from collections.abc import Iterator

from latentforge.kernels.guard.machine import Machine
from latentforge.kernels.guard.variants import Variant

# The smallest, a ragged one, a typical one, more than 1024 blocks, the largest.
KD_SHAPES = ((1, 33), (7, 1003), (256, 50257), (1500, 4099), (1024, 151936))  # rows, vocabulary
LINEAR_SHAPES = ((1, 16, 33), (7, 40, 1003), (256, 1024, 50257), (1500, 64, 4099), (512, 1024, 151936))
DECODE_SHAPES = ((1, 16, 33), (7, 72, 1003), (8, 1024, 50257), (1100, 64, 4099), (64, 1024, 151936))
SMALL_KD_SHAPES = ((1, 33), (7, 1003), (1100, 259))
SMALL_LINEAR_SHAPES = ((1, 16, 33), (7, 40, 1003), (1100, 24, 131))  # rows, width, vocabulary
SMALL_DECODE_SHAPES = ((1, 16, 33), (7, 72, 1003), (1100, 24, 131))

# What compiles a rung's kernels without a launch.
COMPILERS = {"triton": "latentforge.kernels.triton.ahead:compile_for_guard"}


def table(machine: Machine) -> list[Variant]:
    """Every variant of the device that training would use here: the GPU's where there is one, else the processor's."""
    return list(_on_cuda(machine) if machine.capability is not None else _on_cpu())


def _on_cuda(machine: Machine) -> Iterator[Variant]:
    rungs = ("cuda", "triton", "reference") if machine.triton != "none" else ("cuda", "reference")
    for rung in rungs:
        yield from _kd(rung, ("forward", "reverse"), KD_SHAPES)
    for rung in ("cuda", "reference"):
        yield from _linear(rung, LINEAR_SHAPES)
    for rung in rungs:
        yield from _decode(rung, DECODE_SHAPES)


def _on_cpu() -> Iterator[Variant]:
    yield from _kd("cpu", ("forward", "reverse", "jsd"), SMALL_KD_SHAPES, device="cpu")
    yield from _linear("cpu", SMALL_LINEAR_SHAPES, device="cpu")
    yield from _decode("cpu", SMALL_DECODE_SHAPES, device="cpu")


def _kd(rung: str, directions: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], **where: str) -> Iterator[Variant]:
    entry = f"latentforge.kernels.{rung}.kd:row_losses"
    entry = "latentforge.kernels.guard.trials:reference_rows" if rung == "reference" else entry
    for dtype in ("bf16", "fp32"):
        for targets in ("dense", "topk"):
            for direction in directions:
                how = {"compile": COMPILERS.get(rung), **where}
                yield Variant("kd_loss", dtype, rung, entry, targets, direction, shapes=shapes, **how)  # type: ignore[arg-type]


def _linear(rung: str, shapes: tuple[tuple[int, ...], ...], **where: str) -> Iterator[Variant]:
    entry, options = "latentforge.kernels.linear:linear_kd_loss", (("backend", rung),)
    for dtype in ("bf16", "fp32"):
        for targets in ("dense", "topk"):
            yield Variant("linear_kd_loss", dtype, rung, entry, targets, shapes=shapes, options=options, **where)  # type: ignore[arg-type]


def _decode(rung: str, shapes: tuple[tuple[int, ...], ...], **where: str) -> Iterator[Variant]:
    entry = f"latentforge.kernels.{rung}.decode:decode"
    for dtype in ("bf16", "fp32"):
        for weight in ("float", "int8"):
            how = {"compile": COMPILERS.get(rung), **where}
            yield Variant("latent_decode", dtype, rung, entry, weight, shapes=shapes, **how)  # type: ignore[arg-type]
