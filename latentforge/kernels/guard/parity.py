"""Is it right, every time? Several calls on several shapes, each compared, with what must not be written watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from latentforge.kernels.guard.trials import Trial, Wanted

CALLS = 3
"""All compared: a kernel of another project was right on its first call in a process and wrong on each later one."""


@dataclass
class Proof:
    """``reason`` None means that it held; ``worst`` is the largest error over what is allowed."""

    reason: str | None = None
    detail: str = ""
    worst: float = 0.0
    shapes: list[tuple[int, ...]] = field(default_factory=list)


def prove(
    entry: Callable[..., Any],
    shapes: Iterable[tuple[int, ...]],
    make: Callable[[tuple[int, ...], int], Trial],
    *,
    deterministic: bool = True,
    options: dict[str, Any] | None = None,
) -> Proof:
    """Compare ``entry`` with the reference on each shape; stops at the first thing that is wrong."""
    proof = Proof()
    before: Trial | None = None
    for number, shape in enumerate(shapes):
        trial = make(shape, number)
        proof.shapes.append(shape)
        if not _prove_shape(proof, entry, trial, before, deterministic, options or {}, str(shape)):
            return proof
        before = trial
    if not proof.shapes:
        proof.reason, proof.detail = "mismatch_first_call", "no shape was compared"
    return proof


def _prove_shape(
    proof: Proof,
    entry: Callable[..., Any],
    trial: Trial,
    other: Trial | None,
    deterministic: bool,
    options: dict[str, Any],
    shape: str,
) -> bool:
    first: dict[str, Tensor] = {}
    for call in range(CALLS + 1):
        if call == CALLS:
            # Once more, with a call of another shape in between.
            if other is None:
                break
            other.call(entry, **options)
        found = trial.call(entry, **options)
        where = f"shape {shape}, call {call + 1}"
        problem = _compare(proof, found, trial.wanted, later=call > 0) or trial.bands.disturbed()
        if problem is None and call > 0 and deterministic and not _same_bits(first, found):
            problem = ("nondeterministic", "equal calls gave different bits")
        if problem is not None:
            proof.reason, proof.detail = problem[0], f"{where}: {problem[1]}"
            return False
        first = first or found
    told = trial.read_only(entry, **options)
    if told is not None:
        wanted = {name: trial.wanted[name] for name in told}
        problem = _compare(proof, told, wanted, later=True) or trial.bands.disturbed(written=False)
        if problem is not None:
            proof.reason, proof.detail = problem[0], f"shape {shape}, without a gradient: {problem[1]}"
            return False
    return True


def _compare(
    proof: Proof, found: dict[str, Tensor], wanted: dict[str, Wanted], *, later: bool
) -> tuple[str, str] | None:
    """(reason, detail) of the first output that is wrong."""
    mismatch = "mismatch_later_call" if later else "mismatch_first_call"
    for name, want in wanted.items():
        value = found[name]
        if value.shape != want.value.shape:
            return mismatch, f"{name} has shape {tuple(value.shape)}, not {tuple(want.value.shape)}"
        bad = want.value.isfinite() & ~value.isfinite()
        if bool(bad.any()):
            return "nan", f"{int(bad.sum())} of {bad.numel()} entries of {name} are not finite"
        if value.numel() > 1 and _constant(value) and not _constant(want.value):
            return mismatch, f"all {value.numel()} entries of {name} are {float(value.reshape(-1)[0]):g}"
        error = want.off(value)
        proof.worst = max(proof.worst, error / want.tolerance)
        if not error <= want.tolerance:
            return mismatch, f"{name} is off by {error:.2e} of its length, {want.tolerance:.2e} is allowed"
    return None


def _constant(value: Tensor) -> bool:
    return bool((value == value.reshape(-1)[0]).all())


def _same_bits(first: dict[str, Tensor], found: dict[str, Tensor]) -> bool:
    return all(torch.equal(_bits(value), _bits(found[name])) for name, value in first.items())


def _bits(value: Tensor) -> Tensor:
    return value.reshape(-1).contiguous().view(torch.uint8)
