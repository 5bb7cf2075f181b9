"""What a proof is a proof of: the hash of everything that could make the same variant another kernel.

Host name, clocks and memory are no part of it; a driver, assembler, library or source that changes is, so that a record
of before is simply not found.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from latentforge.kernels.guard.machine import Machine
from latentforge.kernels.guard.variants import Variant

GUARD_VERSION = 1


@dataclass(frozen=True)
class Key:
    """The named parts and their digest (20 hex digits), which names the record's file."""

    parts: dict[str, str]

    @property
    def digest(self) -> str:
        """Of all parts, by name."""
        body = json.dumps(self.parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(body.encode()).hexdigest()[:20]


def key_of(variant: Variant, machine: Machine) -> Key:
    """The key of a variant on a machine."""
    return Key(
        {
            "variant": variant.name,
            "entry": variant.entry,
            "compile": variant.compile or "none",
            "options": json.dumps([list(one) for one in variant.options]),
            "candidates": json.dumps(variant.candidates),
            "shapes": json.dumps(variant.shapes),
            "deterministic": str(variant.deterministic),
            "build": native_build(),
            "files": files_digest(variant),
            "arch": machine.arch,
            "multiprocessors": str(machine.multiprocessors),
            "driver": machine.driver,
            "cuda_runtime": machine.cuda_runtime,
            "nvrtc": machine.nvrtc,
            "torch": machine.torch,
            "triton": machine.triton,
            "ptxas": machine.ptxas,
            "kernel": machine.kernel,
            "code_options": json.dumps(machine.code_options),
            "guard": guard_version(),
        }
    )


@cache
def native_build() -> str:
    """sha256 of the extension's file, ``none`` where there is none. The file is not loaded."""
    spec = find_spec("latentforge._native")
    if spec is None or spec.origin is None:
        return "none"
    return _sha256(Path(spec.origin))


def files_digest(variant: Variant) -> str:
    """Digest over the sources that a variant may reach: beside its entry, of its backend, and those that all share."""
    package = "latentforge.kernels"
    modules = (variant.entry.partition(":")[0], f"{package}.{variant.backend}", package)
    return hashlib.sha256("".join(_sources(module) for module in modules).encode()).hexdigest()


@cache
def _sources(module: str) -> str:
    """Digest over the Python files of a module's folder, of the file alone where that is no package."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return "none"
    file = Path(spec.origin)
    files = sorted(file.parent.glob("*.py")) if (file.parent / "__init__.py").is_file() else [file]
    return _digest(files)


@cache
def guard_version() -> str:
    """The number of the guard's rules, and the digest of the code that applies them."""
    return f"{GUARD_VERSION}:{_digest(sorted(Path(__file__).parent.glob('*.py')))[:16]}"


def _digest(files: list[Path]) -> str:
    lines = "".join(f"{file.name}\0{_sha256(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
