"""What a proof depends on, as this process finds it: GPU, driver, libraries, compilers."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CODE_OPTIONS = (
    "CUDA_FORCE_PTX_JIT",
    "DISABLE_PTXAS_OPT",
    "NVIDIA_TF32_OVERRIDE",
    "PTXAS_OPTIONS",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TRITON_DEFAULT_FP_FUSION",
    "TRITON_INTERPRET",
    "TRITON_PTXAS_BLACKWELL_PATH",
    "TRITON_PTXAS_PATH",
    "LATENTFORGE_CPU_VARIANT",
)
"""Environment variables that alter the code which runs."""


@dataclass(frozen=True)
class Machine:
    """All that enters every key, and what the guard shows of the host.

    ``capability`` is (12, 1) on GB10, None where torch sees no CUDA device; ``why_not`` says why. Versions are text,
    ``none`` where a thing is not there. ``unified``: the GPU's memory is the host's.
    """

    capability: tuple[int, int] | None
    multiprocessors: int
    driver: str
    cuda_runtime: str
    nvrtc: str
    torch: str
    triton: str
    ptxas: str
    kernel: str
    code_options: tuple[tuple[str, str], ...] = ()
    device_name: str = ""
    driver_cuda: tuple[int, int] | None = None
    why_not: str = ""
    unified: bool = False

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Machine:
        """The machine that a child saw, of its fields."""
        pairs = {name: tuple(value[name]) if value[name] else None for name in ("capability", "driver_cuda")}
        options = tuple((name, setting) for name, setting in value["code_options"])
        return cls(**{**value, **pairs, "code_options": options})

    @property
    def arch(self) -> str:
        """``12.1``, or the processor's architecture where there is no GPU."""
        return platform.machine() if self.capability is None else "{}.{}".format(*self.capability)


def driver_version() -> str | None:
    """The driver's version by its own file (580.142); None where no driver is loaded. Never starts CUDA."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    return found.group(1) if found else "unknown"


def look(device: int = 0) -> Machine:
    """Look at this machine. Starts CUDA where there is a device: for children and for a process that trains."""
    import torch

    common = {
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "ptxas": ptxas_version(),
        "kernel": platform.release(),
        "code_options": tuple((name, os.environ[name]) for name in CODE_OPTIONS if name in os.environ),
    }
    driver = driver_version()
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        return Machine(
            capability=None,
            multiprocessors=0,
            driver=driver or "none",
            cuda_runtime=torch.version.cuda or "none",
            nvrtc="none",
            why_not=why + ("" if driver is None else f" (driver {driver} is loaded)"),
            **common,  # type: ignore[arg-type]
        )
    found = torch.cuda.get_device_properties(device)
    return Machine(
        capability=(found.major, found.minor),
        multiprocessors=found.multi_processor_count,
        driver=driver or "unknown",
        cuda_runtime=torch.version.cuda or "none",
        nvrtc=_nvrtc_version(),
        device_name=found.name,
        driver_cuda=_driver_cuda(),
        unified=bool(found.is_integrated),
        **common,  # type: ignore[arg-type]
    )


@cache
def ptxas_version() -> str:
    """The assemblers of Triton (from 3.6 the Blackwell one is used on GB10), of its overrides and of the PATH."""
    spec = find_spec("triton")
    candidates = [os.environ.get("TRITON_PTXAS_BLACKWELL_PATH"), os.environ.get("TRITON_PTXAS_PATH")]
    for root in (spec.submodule_search_locations or ()) if spec else ():
        candidates += [str(Path(root) / "backends/nvidia/bin" / name) for name in ("ptxas-blackwell", "ptxas")]
    candidates.append(shutil.which("ptxas"))
    found = []
    for program in candidates:
        if program and Path(program).is_file():
            said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60).stdout
            version = re.search(r"V(\d+\.\d+\.\d+)", said)
            found.append(version.group(1) if version else "unknown")
    return "+".join(dict.fromkeys(found)) or "none"


def memory_available() -> int:
    """MemAvailable in bytes: what CUDA calls free counts the page cache as used on unified memory."""
    return _meminfo("MemAvailable")


def memory_total() -> int:
    """MemTotal in bytes."""
    return _meminfo("MemTotal")


def kernel_log_since(seconds: float) -> list[str] | None:
    """Lines of the kernel's log about the GPU or about memory from the last ``seconds``; None where it is not read."""
    program = shutil.which("journalctl")
    if program is None:
        return None
    try:
        said = subprocess.run(
            [program, "-k", "-q", "--no-pager", "-o", "cat", "--since", f"-{int(seconds) + 1}s"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if said.returncode != 0:
        return None
    return [line for line in said.stdout.splitlines() if GPU_TROUBLE.search(line) or OUT_OF_MEMORY.search(line)]


GPU_TROUBLE = re.compile(r"NVRM: Xid|NV_ERR_NO_MEMORY")
OUT_OF_MEMORY = re.compile(r"[Oo]ut of memory|oom-kill|NV_ERR_NO_MEMORY")


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def version_of(name: str) -> str:
    """The installed version of a package; ``none`` where it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def _nvrtc_version() -> str:
    """The version of the NVRTC that this process would load: a stray library of another CUDA shows here."""
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0:
            return f"{major.value}.{minor.value}"
    return "none"


def _driver_cuda() -> tuple[int, int] | None:
    try:
        library, version = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return None
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10
