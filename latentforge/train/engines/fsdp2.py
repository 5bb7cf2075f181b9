"""torch's ``fully_shard``: each process keeps its part of every tensor, and gathers a layer where it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from latentforge.errors import FailedError
from latentforge.train.engines.protocol import Wrapped
from latentforge.train.engines.world import World
from latentforge.train.optimiser import MasterOptimiser

NAME = "fsdp2"


def shard(student: nn.Module, layers: Sequence[nn.Module], precision: torch.dtype, methods: Sequence[str] = ()) -> None:
    """Shard ``student`` over all processes in place: each of ``layers`` is gathered by itself, all else at once.

    Parameters stay fp32, each process's part of which is its part of the masters; passes gather and compute them as
    ``precision``. ``methods`` are those of the student besides ``forward`` that use its parameters. ``layers`` are
    modules that every process calls in every pass.
    """
    device = next(student.parameters()).device.type
    mesh = init_device_mesh(device, (World.here().size,))
    # Inputs are left as they are: the teacher's log-probabilities are not to be rounded with the activations.
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    for layer in layers:
        fully_shard(layer, **settings)
    fully_shard(student, **settings)
    for method in methods:
        register_fsdp_forward_method(student, method)


class Fsdp2:
    """The engine ``fsdp2``, of a student that :func:`shard` has sharded before its optimiser was made.

    Gradients are summed and sharded in each pass: a whole gradient kept for the next one is what sharding is to save.
    """

    def __init__(self, student: nn.Module, optimiser: MasterOptimiser) -> None:
        self.world = World.here()
        self.module = student
        self.optimiser = optimiser

    @property
    def precision(self) -> torch.dtype:
        """That in which weights are gathered, as ``fully_shard`` holds it."""
        found: torch.dtype = self.module._get_fsdp_state()._mp_policy.param_dtype  # type: ignore[operator, union-attr]
        return found

    def passing(self, *, last: bool) -> AbstractContextManager[None]:
        """Nothing is held back for the last pass."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one pass."""
        (loss * self.world.size).backward()  # fully_shard averages

    def step(self) -> float:
        """Update the own part; the norm of the whole gradient before clipping."""
        return self.optimiser.step()

    def rehearsed(self) -> None:
        """Without a gradient, as before: AdamW makes moments for a tensor that has one, of zero too."""
        self.optimiser.forget_gradients()

    def wrapped(self) -> Wrapped:
        """The own part of each tensor, as large as it is."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        bare = [name for name, p in self.module.named_parameters() if not isinstance(p, DTensor)]
        if bare:
            raise FailedError(f"distributed = {NAME!r}: {len(bare)} tensor(s) are not sharded: {', '.join(bare[:3])}")
        held, states = (sum(_local(p) for p in some) for some in (trained, self.optimiser.masters.values()))
        found = Wrapped(
            NAME, type(self.module).__name__, self.world.size, sum(p.numel() for p in trained), held, states
        )
        # A tensor is cut along its first dimension: a row more than an even share of each may lie here.
        rows = sum(p.numel() // max(1, len(p)) for p in trained)
        wrapper = f"FSDP{_plain_name(self.module)}"
        return found.require(NAME, wrapper=wrapper, sharded=True, states_sharded=True, largest=rows)


def _local(tensor: Tensor) -> int:
    return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()


def _plain_name(module: nn.Module) -> str:
    """The name of the class that ``fully_shard`` made a subclass of."""
    return type(module).__mro__[2].__name__
