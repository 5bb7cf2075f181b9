"""The extension of this checkout, built for aarch64 and loaded in the arm64 Python under qemu."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _sibling(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    full = f"latentforge_tests_aarch64_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


@pytest.fixture(scope="session")
def cross() -> ModuleType:
    """The cross build; tests that ask for it are skipped where this machine cannot do it, with the reason."""
    module = _sibling("cross")
    try:
        module.ready()
    except module.Missing as reason:
        pytest.skip(str(reason))
    return module


@pytest.fixture(scope="session")
def start(cross: ModuleType) -> Iterator[Callable[..., Any]]:
    """Starts an emulated process with the extension in it: ``start(processor="max", library=None)``."""
    root, built = cross.ready()
    running: dict[tuple[str, Path], Any] = {}

    def started(processor: str = "max", library: Path | None = None) -> Any:
        key = (processor, library or built)
        if key not in running:
            command = [*cross.interpreter(root, processor), str(Path(__file__).with_name("guest.py"))]
            running[key] = _sibling("emulated").Emulated(command, str(key[1]))
        return running[key]

    yield started
    for one in running.values():
        one.close()


@pytest.fixture
def arm(start: Callable[..., Any]) -> Iterator[Any]:
    """``latentforge.kernels`` on a processor with everything that qemu can emulate."""
    with start().in_place() as extension:
        yield extension
