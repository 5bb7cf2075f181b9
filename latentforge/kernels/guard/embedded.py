"""The machine code that a module carries, as the object lister prints it, and whether a GPU can run it.

The lister (``cuobjdump --list-elf --list-ptx``) names entries by architecture. A family target shows as the plain one
(``120f`` as ``sm_120``), which is how it runs; only ``sm_121a`` keeps its letter. Code runs on GPUs of the same major
and an equal or higher minor number, code with a letter on exactly its own.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_ENTRY = re.compile(r"^(ELF|PTX) file\s+\d+: \S*?\.?sm_(\d{2,3})([af]?)\.(?:cubin|ptx)\s*$", re.MULTILINE)
_PTX_VERSION = re.compile(r"^\.version (\d+)\.(\d+)\s*$", re.MULTILINE)

# The newest PTX that a driver of each CUDA version translates (PTX ISA release notes).
_PTX_OF_CUDA = {
    (12, 4): (8, 4),
    (12, 5): (8, 5),
    (12, 6): (8, 5),
    (12, 7): (8, 6),
    (12, 8): (8, 7),
    (12, 9): (8, 8),
    (13, 0): (9, 0),
    (13, 1): (9, 1),
}


@dataclass(frozen=True)
class Embedded:
    """Architectures of machine code and of PTX (``121``, ``121a``), and the PTX's version where it was read."""

    code: tuple[str, ...]
    ptx: tuple[str, ...]
    ptx_version: tuple[int, int] | None = None


@dataclass(frozen=True)
class Answer:
    """Whether a GPU can run it: ``reason`` None means yes, ``detail`` says what was found."""

    reason: str | None
    detail: str


def parse_listing(listing: str, ptx: str = "") -> Embedded:
    """What a listing names; text that is none names nothing. ``ptx`` is the dumped PTX, for its version."""
    code: list[str] = []
    translatable: list[str] = []
    for kind, number, letter in _ENTRY.findall(listing):
        (code if kind == "ELF" else translatable).append(number + letter)
    versions = [(int(major), int(minor)) for major, minor in _PTX_VERSION.findall(ptx)]
    return Embedded(tuple(dict.fromkeys(code)), tuple(dict.fromkeys(translatable)), max(versions) if versions else None)


def accept(embedded: Embedded, capability: tuple[int, int], driver_cuda: tuple[int, int] | None) -> Answer:
    """Whether a GPU of ``capability`` (12, 1) runs this without any translation by the driver.

    PTX alone is refused, since PTX translation is off where kernels are proven: ``ptx_too_new`` where the driver could
    not translate it either, ``no_cubin`` otherwise.
    """
    here = f"sm_{capability[0]}{capability[1]}"
    runs = [arch for arch in embedded.code if _runs(arch, capability)]
    if runs:
        return Answer(None, "machine code " + ", ".join(f"sm_{arch}" for arch in runs))
    found = ", ".join(f"sm_{arch}" for arch in embedded.code)
    if embedded.ptx:
        version = embedded.ptx_version
        newest = None if driver_cuda is None else newest_ptx(driver_cuda)
        if version is not None and newest is not None and version > newest:
            return Answer(
                "ptx_too_new",
                f"PTX {version[0]}.{version[1]} only; the driver (CUDA {driver_cuda[0]}.{driver_cuda[1]}) "  # type: ignore[index]
                f"knows {newest[0]}.{newest[1]}",
            )
        shown = ", ".join(f"compute_{arch}" for arch in embedded.ptx)
        return Answer("no_cubin", f"no machine code that {here} runs (code: {found or 'none'}; PTX: {shown})")
    return Answer("no_cubin", f"no machine code that {here} runs (code: {found or 'none'})")


def newest_ptx(cuda: tuple[int, int]) -> tuple[int, int] | None:
    """The newest PTX version that a driver of this CUDA version translates; None where that is not known."""
    known = [ptx for version, ptx in _PTX_OF_CUDA.items() if version <= cuda]
    return max(known) if known and cuda <= max(_PTX_OF_CUDA) else None


def lister() -> str | None:
    """The object lister: on the PATH, of the pip toolkit, or the one that Triton brings; None where there is none."""
    on_path = shutil.which("cuobjdump")
    if on_path:
        return on_path
    for package, inside in (("nvidia", "cu13/bin/cuobjdump"), ("triton", "backends/nvidia/bin/cuobjdump")):
        spec = find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            if (path := Path(root) / inside).is_file():
                return str(path)
    return None


def list_embedded(file: Path, program: str) -> Embedded:
    """What ``file`` carries, by the lister ``program``. A file without device code carries nothing."""

    def said(*options: str) -> str:
        return subprocess.run([program, *options, str(file)], capture_output=True, text=True, timeout=60).stdout

    found = parse_listing(said("--list-elf") + said("--list-ptx"))
    return parse_listing(said("--list-elf") + said("--list-ptx"), said("--dump-ptx")) if found.ptx else found


def _runs(arch: str, capability: tuple[int, int]) -> bool:
    number = arch.rstrip("af")
    major, minor = int(number[:-1]), int(number[-1])
    if arch.endswith("a"):
        return (major, minor) == capability
    return major == capability[0] and minor <= capability[1]
