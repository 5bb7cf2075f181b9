"""Which backends there are for an operator, whether they can run here, and on what device."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

from latentforge.errors import LatentForgeError, RefusedError
from latentforge.kernels import backends

# The module of a backend that does an operator's work: linear_kd_loss is torch's products around the loss of the rows.
ROOMS = {"kd_loss": "kd", "linear_kd_loss": "kd", "latent_decode": "decode"}
BACKENDS = tuple(name for name in backends.BACKENDS if name != "auto")


def room(op: str, backend: str) -> ModuleType:
    """The module ``latentforge.kernels.<backend>.<kd|decode>``; RefusedError where this version has none."""
    name = f"latentforge.kernels.{backend}.{ROOMS[op]}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        raise RefusedError(f"{op} has no {backend} backend in this version") from error


def device_of(backend: str) -> torch.device:
    """The device on which a backend is measured and compared: CUDA where there is one and the backend uses it."""
    on_cuda = backend in ("cuda", "triton") and torch.cuda.is_available()
    return torch.device("cuda" if on_cuda else "cpu")


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors: right numbers, no speed."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(op: str, backend: str) -> str | None:
    """Why ``backend`` cannot run ``op`` on this machine; None where it can."""
    if op not in backends.OPS:
        raise RefusedError(f"op {op!r} is not one of {', '.join(backends.OPS)}")
    if backend not in BACKENDS:
        raise RefusedError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend not in backends.OPS[op]:
        return f"{op} has no {backend} backend"
    if backend == "cuda" and not torch.cuda.is_available():
        return "no CUDA device here"
    if backend == "triton" and not (torch.cuda.is_available() or interpreted()):
        return "no CUDA device here (TRITON_INTERPRET=1 runs its kernels in the interpreter)"
    try:
        room(op, backend)
        if backend == "cpu":
            from latentforge.kernels.native import native

            native()
    except ImportError as error:
        return f"{error.name or error} cannot be imported"
    except LatentForgeError as error:
        return str(error)
    return None


def variants(op: str, backend: str) -> tuple[str | None, ...]:
    """What a backend is compared in: each instruction set that this machine can run for cpu, None for the others."""
    # linear_kd_loss is torch's products around the rows' loss: it has one path.
    if backend != "cpu" or op == "linear_kd_loss":
        return (None,)
    from latentforge.kernels.native import native

    module = native()
    return tuple(module.decode_variants() if op == "latent_decode" else module.cpu_variants())
