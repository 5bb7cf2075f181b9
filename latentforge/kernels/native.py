"""The extension ``latentforge._native``: found, and built from the sources that lie here."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from latentforge.errors import LatentForgeError

_SOURCE_SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".py"}


def source_digest(root: Path) -> str | None:
    """Digest (hex) of ``CMakeLists.txt`` and ``csrc/`` under ``root``; None where there is no such checkout.

    The same rule as ``csrc/source_digest.py``, which writes it into the extension when that is built.
    """
    if not (root / "CMakeLists.txt").is_file() or not (root / "csrc" / "module.cpp").is_file():
        return None
    files = [root / "CMakeLists.txt"]
    files += [path for path in (root / "csrc").rglob("*") if path.suffix in _SOURCE_SUFFIXES and path.is_file()]
    lines = {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    digest = hashlib.sha256()
    for name in sorted(lines, key=str.encode):
        digest.update(f"{name}\0{lines[name]}\n".encode())
    return digest.hexdigest()


def require_fresh(built: str, sources: str | None) -> None:
    """Refuse an extension that was built from other sources than those of the checkout."""
    if sources is not None and built != sources:
        raise LatentForgeError(
            f"the extension latentforge._native is stale: it was built from sources {built[:12]}, "
            f"the checkout has {sources[:12]}",
            next="make setup",
        )


@cache
def native() -> ModuleType:
    """The extension module; LatentForgeError where it is missing or older than the checkout's sources."""
    try:
        module = import_module("latentforge._native")
    except ImportError as error:
        raise LatentForgeError(
            f"the cpu kernels are not built in this installation ({error})",
            next="make setup, or use backend='reference'",
        ) from error
    require_fresh(module.source_digest(), source_digest(Path(__file__).resolve().parents[2]))
    return module


def extension_identity() -> dict[str, object]:
    """What is recorded about the extension in a run.

    The sha256 of the library file, the digest of its sources, its compiler, its variants on this machine (best first).
    """
    module = native()
    return {
        "sha256": hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest(),
        "source_digest": module.source_digest(),
        "compiler": module.compiler(),
        "cpu_variants": list(module.cpu_variants()),
    }
