"""Kernels in Triton: one source for every NVIDIA GPU, compiled ahead of time for the one that is at hand.

``kd`` and ``decode`` are the backend's calls. Importing this package does not import Triton; ``require`` does, and says
what is missing. Without a GPU the kernels run in Triton's interpreter, on CPU tensors, where ``TRITON_INTERPRET=1`` was
set before Triton was first imported.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from latentforge.errors import RefusedError

if TYPE_CHECKING:
    from torch import Tensor


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one: Triton launches there, wherever the pointers lead."""
    if not tensor.is_cuda:
        return nullcontext()
    import torch

    return torch.cuda.device(tensor.device)


def require(name: str) -> ModuleType:
    """The module ``latentforge.kernels.triton.<name>``, which imports Triton; RefusedError where that is missing."""
    try:
        return import_module(f"{__name__}.{name}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise RefusedError(
            f"backend 'triton', and Triton cannot be imported here ({error})",
            next="pip install 'latentforge[triton]', or pass another backend",
        ) from error
