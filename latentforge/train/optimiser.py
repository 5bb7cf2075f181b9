"""AdamW over fp32 master weights, with warm-up and cosine decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

BETAS = (0.9, 0.95)
DECAY_TO = 0.1
"""The learning rate ends at this fraction of its peak."""

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Updates:
    """How weights are updated: AdamW's peak learning rate and weight decay, its schedule, the norm to clip at."""

    learning_rate: float
    weight_decay: float
    warmup_steps: int
    steps: int
    clip_norm: float | None

    @property
    def schedule(self) -> Schedule:
        """The learning rate of a step as a fraction of its peak."""
        return warmup_cosine(self.warmup_steps, self.steps)


def warmup_cosine(warmup_steps: int, steps: int) -> Schedule:
    """The learning rate of step ``i`` (from 0) as a fraction of its peak: linear up, then a cosine down to a tenth."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        along = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
        return DECAY_TO + (1.0 - DECAY_TO) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, along)))

    return factor


def grouped(parameters: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices, which decay, and vectors, which do not."""
    both = list(parameters)
    matrices, vectors = [p for p in both if p.dim() >= 2], [p for p in both if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class MasterOptimiser:
    """AdamW that updates fp32 master weights and writes them to the working weights of the model.

    Where the model is fp32 both are the same tensors. Gradients of several micro-batches add up in fp32. Matrices
    decay, vectors (norms, biases) do not. Frozen parameters have no master and never change. Of a sharded model each
    process has its part of every tensor; what is asked for whole is gathered, and asked for by all of them.
    """

    def __init__(self, model: nn.Module, updates: Updates) -> None:
        self.model = model
        self.working: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.masters: dict[str, Tensor] = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_(True)
            for name, p in self.working.items()
        }
        self.clip_norm = updates.clip_norm
        self.schedule = updates.schedule
        self.adamw: torch.optim.AdamW | None = None
        if self.masters:
            # One pass over the weights; elementwise, so the same bits on every run with the same threads.
            groups = grouped(self.masters.values(), updates.weight_decay)
            self.adamw = torch.optim.AdamW(groups, lr=updates.learning_rate, betas=BETAS, fused=True)
            for group in self.adamw.param_groups:
                group["initial_lr"] = group["lr"]
        self._asked = updates

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimiser's own groups; empty where everything is frozen."""
        return [] if self.adamw is None else self.adamw.param_groups

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate that the schedule scales, read from the optimiser."""
        return float(self.groups[0]["initial_lr"]) if self.groups else self._asked.learning_rate

    @property
    def weight_decay(self) -> float:
        """The weight decay of matrices, read from the optimiser."""
        return float(self.groups[0]["weight_decay"]) if self.groups else self._asked.weight_decay

    def set_learning_rate(self, step: int) -> float:
        """Set every group to the schedule's value of ``step`` (from 0) and return what the optimiser now holds."""
        for group in self.groups:
            group["lr"] = group["initial_lr"] * self.schedule(step)
        return float(self.groups[0]["lr"]) if self.groups else self._asked.learning_rate * self.schedule(step)

    def collect(self) -> None:
        """Add the working weights' gradients to the masters' and clear them (a no-op where both are the same)."""
        for name, master in self.masters.items():
            working = self.working[name]
            if master is working or working.grad is None:
                continue
            grad = working.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            working.grad = None

    def step(self) -> float:
        """Clip, update, write the working weights, clear the gradients; returns the gradient norm before clipping."""
        if self.adamw is None:
            return 0.0
        limit = math.inf if self.clip_norm is None else self.clip_norm
        masters = list(self.masters.values())
        total = whole(nn.utils.get_total_norm([p.grad for p in masters if p.grad is not None]))
        nn.utils.clip_grads_with_norm_(masters, limit, total)
        norm = float(total)
        if math.isfinite(norm):
            self.adamw.step()
            self.write_working()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def forget_gradients(self) -> None:
        """Drop what was added up of a step that is not made."""
        for parameter in (*self.working.values(), *self.masters.values()):
            parameter.grad = None

    @torch.no_grad()
    def write_working(self) -> None:
        """Round the masters into the working weights (a no-op where both are the same)."""
        for name, master in self.masters.items():
            if master is not self.working[name]:
                self.working[name].copy_(master)

    def each_weight(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters of the model by name, whole: trained ones as fp32 masters."""
        for name, value in {**dict(self.model.named_parameters()), **self.masters}.items():
            yield name, whole(value)

    def each_moment(self) -> Iterator[tuple[str, Tensor]]:
        """AdamW's state as flat tensors: ``<parameter>/exp_avg``, ``/exp_avg_sq``, ``/step``."""
        for name, master in self.masters.items():
            for key, value in self._state(master).items():
                yield f"{name}/{key}", whole(value)

    def weights(self) -> dict[str, Tensor]:
        """Those of :meth:`each_weight`, all at once."""
        return dict(self.each_weight())

    def moments(self) -> dict[str, Tensor]:
        """Those of :meth:`each_moment`, all at once; empty before the first step."""
        return dict(self.each_moment())

    @torch.no_grad()
    def load(self, masters: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Put back what :attr:`masters` and :meth:`moments` held, bit for bit."""
        for name, master in self.masters.items():
            master.copy_(part_of(masters[name], master))
            if self.adamw is None:
                continue
            # One that had no gradient yet (a signal that no row so far had) has no moments either.
            self.adamw.state.pop(master, None)
            if f"{name}/step" in moments:
                found = {key: moments[f"{name}/{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
                where = {key: value.to(master.device) for key, value in found.items()}
                parts = {key: value if key == "step" else part_of(value, master) for key, value in where.items()}
                self.adamw.state[master] = parts
        self.write_working()

    def _state(self, master: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {} if self.adamw is None else self.adamw.state.get(master, {})
        return found


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is, or gathered where each process holds a part of it."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole ``tensor``, laid out as ``like`` is: a tensor as it is where that is whole."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
