"""What a child does: look at the machine, compile, or load a variant and prove it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from latentforge.kernels.guard import cost, machine
from latentforge.kernels.guard.child import MEMORY_BYTES, resolve
from latentforge.kernels.guard.parity import Proof, prove
from latentforge.kernels.guard.trials import KDTrial, Trial, reference_rows
from latentforge.kernels.guard.trials_decode import DecodeTrial
from latentforge.kernels.guard.trials_linear import LinearTrial, reference_linear
from latentforge.kernels.guard.variants import Option, Variant
from latentforge.kernels.reference.decode import decode as reference_decode

_MESSAGES = (
    ("smem_exceeded", re.compile(r"shared memory|OutOfResources|out of resource", re.IGNORECASE)),
    ("ptx_too_new", re.compile(r"unsupported (ptx|toolchain)|error 222|UNSUPPORTED_PTX", re.IGNORECASE)),
    ("no_cubin", re.compile(r"no kernel image|error 209|NO_BINARY_FOR_GPU", re.IGNORECASE)),
    ("oob_write", re.compile(r"illegal (memory )?address|illegal memory access|misaligned address", re.IGNORECASE)),
    ("compile_oom", re.compile(r"out of memory|cannot allocate memory|MemoryError", re.IGNORECASE)),
)


class NotProvenError(Exception):
    """A stage did not pass; the reason is one of the closed list."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def facts(request: dict[str, Any], stage: Callable[[str], None]) -> dict[str, Any]:
    """The machine as a process with CUDA sees it."""
    return asdict(machine.look(int(request.get("device", 0))))


def compile_variant(request: dict[str, Any], stage: Callable[[str], None]) -> dict[str, Any]:
    """Compile without a launch: registers, shared memory and spills as the compiler told them."""
    variant = Variant.from_json(request["variant"])
    assert variant.compile is not None
    try:
        found = resolve(variant.compile)(variant, tuple(request["capability"]))
    except Exception as error:
        return _failed("compile", reason_of(error, "compile"), error)
    limit = request.get("shared_bytes")
    if limit is not None and found.get("shared_bytes", 0) > limit:
        detail = f"{found['shared_bytes']} bytes of shared memory a block, {limit} are there"
        return {"stage": "compile", "reason": "smem_exceeded", "detail": detail}
    return {"stage": "compile", "reason": None, "detail": "", "measured": {"compiled": found}}


def probe(request: dict[str, Any], stage: Callable[[str], None]) -> dict[str, Any]:
    """Load, compare, time, freeze. With ``quick`` only the smallest shape is compared and nothing is timed."""
    variant = Variant.from_json(request["variant"])
    at = "load"
    measured: dict[str, Any] = {}
    config: dict[str, Any] = dict(request.get("config") or {})
    try:
        device = _settle(variant)
        entry = resolve(variant.entry)
        if variant.backend == "cuda":
            measured["loaded"] = _load(variant, device)
        options = {**dict(variant.options), **config}
        at = _enter(stage, "parity")
        shapes = variant.shapes[:1] if request["quick"] else variant.shapes
        _require(_proof(variant, entry, shapes, device, options, measured))
        if not request["quick"]:
            effort = cost.Effort(**request["effort"])
            at = _enter(stage, "cost")
            _time(variant, entry, device, options, effort, measured)
            if variant.candidates:
                at = _enter(stage, "freeze")
                config = _freeze(variant, entry, device, effort, measured)
    except NotProvenError as error:
        return {"stage": at, "reason": error.reason, "detail": str(error), "measured": measured}
    except Exception as error:
        return {**_failed(at, reason_of(error, at), error), "measured": measured}
    slow = measured.get("speed_up", 1.0) < cost.SLOW
    detail = f"{measured['speed_up']:.2f}x the speed of {measured['beside']}" if slow else ""
    return {
        "stage": at,
        "reason": "slow" if slow else None,
        "detail": detail,
        "measured": measured,
        "config": config,
    }


def composite(request: dict[str, Any], stage: Callable[[str], None]) -> dict[str, Any]:
    """Stage 7: the chosen kernels together in one micro-step, with the memory that it took."""
    variant = Variant.from_json(request["variant"])
    try:
        found = resolve(variant.entry)(variant, _settle(variant))
    except Exception as error:
        return _failed("composite", reason_of(error, "composite"), error)
    right = found.finite and all(math.isfinite(loss) for loss in found.losses)
    detail = "" if right else f"losses {found.losses[0]:g} and {found.losses[1]:g}, or weights that are not finite"
    measured = {"losses": list(found.losses), "taken_bytes": found.taken, "allocated_bytes": found.allocated}
    return {"stage": "composite", "reason": None if right else "nan", "detail": detail, "measured": measured}


def make_trial(variant: Variant, device: torch.device) -> Callable[[tuple[int, ...], int], Trial]:
    """How the trial of a shape is made for an operator."""
    makers: dict[str, Any] = {"kd_loss": KDTrial, "linear_kd_loss": LinearTrial, "latent_decode": DecodeTrial}
    return lambda shape, seed: makers[variant.op](variant, shape, device, seed)


def reason_of(error: Exception, stage: str) -> str:
    """The reason that an exception stands for, by its message; ``load_error`` where it says nothing known."""
    said = f"{type(error).__name__}: {error}"
    for reason, pattern in _MESSAGES:
        if pattern.search(said) and (reason != "compile_oom" or stage == "compile"):
            return reason
    return "load_error"


def _settle(variant: Variant) -> torch.device:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if variant.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY_BYTES / total))
    else:
        torch.set_num_threads(1)
    return torch.device(variant.device)


def _load(variant: Variant, device: torch.device) -> dict[str, object]:
    """Every kernel of the operator loaded and none launched; the largest of what they take, spills among it."""
    from latentforge.kernels.cuda.extension import cuda_native

    kernels = cuda_native().cuda_load("decode" if variant.op == "latent_decode" else "kd", device.index or 0)
    largest = {name: max(int(k[name]) for k in kernels) for name in ("registers", "local_bytes", "shared_bytes")}
    return {
        "kernels": len(kernels),
        "code": ", ".join(dict.fromkeys(str(k["code"]) for k in kernels)),
        "registers": largest["registers"],
        "shared_bytes": largest["shared_bytes"],
        "spill_bytes": largest["local_bytes"],
    }


def _proof(
    variant: Variant,
    entry: Callable[..., Any],
    shapes: tuple[tuple[int, ...], ...],
    device: torch.device,
    options: dict[str, Any],
    measured: dict[str, Any],
) -> Proof:
    found = prove(entry, shapes, make_trial(variant, device), deterministic=variant.deterministic, options=options)
    measured |= {"worst": max(found.worst, measured.get("worst", 0.0)), "shapes": [list(s) for s in found.shapes]}
    return found


def _require(proof: Proof) -> None:
    if proof.reason is not None:
        raise NotProvenError(proof.reason, proof.detail)


def _time(
    variant: Variant,
    entry: Callable[..., Any],
    device: torch.device,
    options: dict[str, Any],
    effort: cost.Effort,
    measured: dict[str, Any],
) -> None:
    """Milliseconds on the typical shape, and the ratio to the reference, which every ladder ends with."""
    trial = make_trial(variant, device)(typical(variant), 1)
    before = cost.gpu_reading() if device.type == "cuda" else (None, None)
    timed = [_timed(trial, entry, options)]
    if variant.rung != "reference":
        timed.append(_timed(trial, REFERENCES[variant.op], {}))
    measured["ms"], *beside = cost.milliseconds(timed, device, effort)
    if beside:
        measured |= {"beside": "reference", "speed_up": beside[0] / measured["ms"]}
    unsteady = cost.held_still(before, cost.gpu_reading()) if device.type == "cuda" else None
    if unsteady:
        # What was timed in such a state says nothing of speed: no kernel is called slow for it.
        measured["unsteady"] = unsteady
        measured.pop("speed_up", None)


def _freeze(
    variant: Variant, entry: Callable[..., Any], device: torch.device, effort: cost.Effort, measured: dict[str, Any]
) -> dict[str, Any]:
    """The fastest candidate that is right; the first right one where the machine did not hold still."""
    trial = make_trial(variant, device)(typical(variant), 1)
    before = cost.gpu_reading() if device.type == "cuda" else (None, None)
    right: list[tuple[Option, ...]] = []
    for candidate in variant.candidates:
        options = {**dict(variant.options), **dict(candidate)}
        if _proof(variant, entry, variant.shapes, device, options, measured).reason is None:
            right.append(candidate)
    if not right:
        raise NotProvenError("mismatch_first_call", f"none of {len(variant.candidates)} configurations is right")
    timed = [_timed(trial, entry, {**dict(variant.options), **dict(candidate)}) for candidate in right]
    times = list(zip(cost.milliseconds(timed, device, effort), right, strict=True))
    unsteady = cost.held_still(before, cost.gpu_reading()) if device.type == "cuda" else None
    measured["configurations"] = [{"config": dict(c), "ms": ms} for ms, c in times]
    if unsteady:
        measured["unsteady"] = unsteady
    return dict(times[0][1] if unsteady else min(times, key=lambda one: one[0])[1])


def _timed(
    trial: Trial, entry: Callable[..., Any], options: dict[str, Any]
) -> tuple[Callable[[], object], Callable[[], None]]:
    return lambda: trial.run(entry, **options), trial.bands.restore


def typical(variant: Variant) -> tuple[int, ...]:
    """The shape that is timed: the third (the second where there are two)."""
    return variant.shapes[min(2, len(variant.shapes) - 1)]


def _enter(stage: Callable[[str], None], name: str) -> str:
    stage(name)
    return name


def _failed(stage: str, reason: str, error: Exception) -> dict[str, Any]:
    return {"stage": stage, "reason": reason, "detail": f"{type(error).__name__}: {error}"[:2000]}


REFERENCES: dict[str, Callable[..., Any]] = {
    "kd_loss": reference_rows,
    "linear_kd_loss": reference_linear,
    "latent_decode": reference_decode,
}
