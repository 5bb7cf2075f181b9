"""The CUDA part of the extension: whether it is there, and on which device and stream it works."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentforge.errors import LatentForgeError, RefusedError
from latentforge.kernels.native import native


def cuda_native() -> Any:
    """The extension with its CUDA part; LatentForgeError where it was built without."""
    module = native()
    if module.cuda_info() is None:
        raise LatentForgeError(
            "the extension was built without CUDA kernels",
            next="pip install -r constraints/cuda-build.txt && LATENTFORGE_CUDA=ON make setup",
        )
    return module


def place(tensor: Tensor) -> tuple[int, int]:
    """(device index, handle of torch's current stream there) for the tensor's device."""
    if tensor.device.type != "cuda":
        raise RefusedError(f"the cuda backend works on CUDA tensors, these are on {tensor.device}")
    stream = torch.cuda.current_stream(tensor.device)
    return int(stream.device_index), int(stream.cuda_stream)
