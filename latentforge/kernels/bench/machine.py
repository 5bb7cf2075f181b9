"""The machine that is measured: its name, what is installed, and how fast its memory moves."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch

from latentforge.errors import LatentForgeError
from latentforge.kernels.cpu.variants import variant
from latentforge.kernels.native import native

# Passes over a buffer of each stream: reads and writes, as STREAM counts them.
STREAMS = {"read": 1, "scale": 2, "add": 3, "copy": 2}
SHOWN = {"read": "read", "scale": "a*=2", "add": "a+=b", "copy": "a=b"}


@dataclass(frozen=True)
class Machine:
    """Processor or accelerator, and the versions that a measurement depends on."""

    device: str
    processor: str
    architecture: str
    cores: int
    torch: str
    triton: str | None
    extension: str
    compiler: str
    cpu_variant: str


def this_machine(device: torch.device) -> Machine:
    """The machine as it is now; ``extension`` is the digest of the sources that the C++ kernels were built from."""
    try:
        module = native()
        extension, compiler, chosen = str(module.source_digest()), str(module.compiler()), variant()
    except LatentForgeError as error:
        extension, compiler, chosen = "not built", str(error), "none"
    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        processor=cpu_name(),
        architecture=platform.machine(),
        cores=os.cpu_count() or 1,
        torch=torch.__version__,
        triton=installed("triton"),
        extension=extension,
        compiler=compiler,
        cpu_variant=chosen,
    )


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith(("model name", "Model")):
                    return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


class Streams:
    """Buffers over which the memory's speed is measured, in turns with the kernels.

    ``size`` bytes each; they should be larger than the last cache. On CUDA one stream, the device's own copy, stands
    for all.
    """

    def __init__(self, size: int, threads: int, device: torch.device) -> None:
        count = max(size // 4, 1 << 16) // 2 * 2
        # Written to, so that every page is there before it is measured.
        self._a = torch.full((count,), 1.0, device=device)
        self._b = torch.full((count,), 2.0, device=device)
        self._threads = threads
        self.names = ("copy",) if device.type == "cuda" else tuple(STREAMS)

    def bytes(self, name: str) -> int:
        """What one pass of a stream moves."""
        return STREAMS[name] * 4 * self._a.numel()

    def action(self, name: str) -> Callable[[], object]:
        """One pass of a stream."""
        a, b, threads = self._a, self._b, self._threads
        if a.device.type == "cuda":
            return lambda: a.copy_(b)
        module, count = native(), a.numel()
        actions: dict[str, Callable[[], object]] = {
            "read": lambda: module.stream_read(a.data_ptr(), count // 2, threads),
            "scale": lambda: module.stream_scale(a.data_ptr(), count, threads),
            "add": lambda: module.stream_add(a.data_ptr(), b.data_ptr(), count, threads),
            "copy": lambda: module.stream_copy(a.data_ptr(), b.data_ptr(), count, threads),
        }
        return actions[name]
