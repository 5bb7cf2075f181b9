"""One micro-step as training makes it, in a child: what loads only in company (vendor libraries) loads there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from latentforge.kernels.guard.ladder import Choice
from latentforge.kernels.guard.machine import Machine, memory_available
from latentforge.kernels.guard.trials import DTYPES
from latentforge.kernels.guard.variants import Variant

SHAPE = (4, 1024, 1024, 151936)  # sequences, positions, width, vocabulary
SMALL_SHAPE = (2, 16, 32, 1003)
TOP_K = 32
OPS = ("kd_loss", "linear_kd_loss", "latent_decode")


@dataclass(frozen=True)
class MicroStep:
    """The loss of two steps on the same batch, and the memory that they took in bytes (MemAvailable, allocator)."""

    losses: tuple[float, float]
    finite: bool
    taken: int
    allocated: int


def composites(machine: Machine, choices: Sequence[Choice], shape: tuple[int, ...] | None = None) -> list[Variant]:
    """One composite for each precision of which all operators have a rung; ``shape`` that of the run, where known."""
    gpu = machine.capability is not None
    wanted = shape or (SHAPE if gpu else SMALL_SHAPE)
    found = []
    for dtype in dict.fromkeys(choice.dtype for choice in choices):
        of = {choice.op: choice.backend for choice in choices if choice.dtype == dtype}
        if set(OPS) <= of.keys() and None not in of.values():
            options = tuple((op, str(backend)) for op, backend in sorted(of.items()))
            entry = "latentforge.kernels.guard.composite:micro_step"
            where: Any = "cuda" if gpu else "cpu"
            rung = str(of["kd_loss"])
            found.append(
                Variant("composite", dtype, rung, entry, "none", device=where, shapes=(wanted,), options=options)  # type: ignore[arg-type]
            )
    return found


def micro_step(variant: Variant, device: torch.device) -> MicroStep:
    """Two steps of a small student: logits with top-k targets, then the last layer's loss, AdamW; then a decode."""
    from latentforge.kernels import kd_loss, latent_decode, linear_kd_loss
    from latentforge.kernels.targets import LinearTargets, topk_targets

    backends = dict(variant.options)
    sequences, positions, width, vocab = variant.shapes[0]
    torch.manual_seed(0)
    before = memory_available()
    body = nn.Sequential(nn.Embedding(vocab, width), nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
    student = nn.ModuleDict({"body": body, "head": nn.Linear(width, vocab, bias=False)})
    student = student.to(device, DTYPES[variant.dtype])
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-3)
    tokens = torch.randint(0, vocab, (sequences, positions), device=device)
    labels = tokens.roll(-1, dims=1).reshape(-1)
    settings: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.3, "kd_weight": 0.7}
    with torch.no_grad():
        of_teacher = student["body"](tokens).reshape(-1, width).clone()
        teacher_weight = student["head"].weight.detach().clone()
        rows = [part @ teacher_weight.T for part in of_teacher.split(256)]
        parts = [topk_targets(logits, min(TOP_K, vocab), 2.0) for logits in rows]
    targets = type(parts[0])(*(torch.cat([getattr(p, n) for p in parts]) for n in ("ids", "logprobs", "tail")))
    del rows
    losses: list[float] = []
    for step in range(2):
        hidden = student["body"](tokens).reshape(-1, width)
        if step == 0:
            found = kd_loss(
                student["head"](hidden),
                targets,
                labels,
                denominator=len(labels),
                backend=str(backends["kd_loss"]),
                **settings,
            )
        else:
            found = linear_kd_loss(
                hidden,
                student["head"].weight,
                LinearTargets(of_teacher, teacher_weight),
                labels,
                denominator=len(labels),
                backend=str(backends["linear_kd_loss"]),
                **settings,
            )
        found.loss.backward()
        losses.append(float(found.loss.detach()))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    with torch.no_grad():
        ids = latent_decode(of_teacher[:4], teacher_weight, backend=str(backends["latent_decode"])).ids
    finite = all(bool(p.isfinite().all()) for p in student.parameters()) and bool((ids >= 0).all())
    allocated = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return MicroStep((losses[0], losses[1]), finite, max(0, before - memory_available()), allocated)
