"""What the next step draws from: torch's generator on the CPU, and that of the GPU where the process uses one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Generators:
    """The states of torch's generators, uint8 on the CPU; ``cuda`` is that of the current CUDA device (dropout on a GPU
    draws from it), None where the process has used none."""

    cpu: Tensor
    cuda: Tensor | None = None

    @classmethod
    def now(cls) -> Generators:
        """As they are."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None)

    def put_back(self) -> None:
        """Draw on from these states; that of a GPU only where the process uses one (:meth:`elsewhere`)."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(self.cuda)

    @property
    def elsewhere(self) -> bool:
        """Whether they are of a process with a GPU, and this one has none in use, or the other way round: then what is
        drawn from here on is not what would have been drawn there."""
        return (self.cuda is not None) != torch.cuda.is_initialized()
