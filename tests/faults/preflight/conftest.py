"""The fake GPU of tests/preflight, for faults that a launch must meet before anything starts."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.fixtures import FixtureFunctionDefinition

_name = "latentforge_tests_preflight"
_spec = importlib.util.spec_from_file_location(_name, Path(__file__).parents[2] / "preflight" / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules[_name] = _module
_spec.loader.exec_module(_module)
for _key in ("gb10",):
    _fixture = getattr(_module, _key)
    assert isinstance(_fixture, FixtureFunctionDefinition)
    globals()[_key] = _fixture


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small file system with the options that a test gives, taken away at the end."""
    made: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        argv = ["mount", "-t", "tmpfs", "-o", f"{options},mode=0700", "tmpfs", str(folder)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a small filesystem cannot be mounted here: {done.stderr.strip()}")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", str(folder)], check=True)
