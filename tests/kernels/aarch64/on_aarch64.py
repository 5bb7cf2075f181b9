"""A pytest plugin (`make test-aarch64`): the tests that are named run with their kernels on an emulated aarch64.

    PYTHONPATH=tests/kernels/aarch64 python -m pytest -p on_aarch64 tests/kernels/noise

torch and the judging stay on this machine. LATENTFORGE_PROCESSOR names the processor for qemu (default max),
LATENTFORGE_LIBRARY another build of the extension.
"""

from __future__ import annotations

import os
from pathlib import Path

import cross
import pytest
from emulated import Emulated


def pytest_configure(config: pytest.Config) -> None:
    """Before anything is collected: test modules ask the extension for its variants when they are imported."""
    root, library = cross.ready()
    command = cross.interpreter(root, os.environ.get("LATENTFORGE_PROCESSOR", "max"))
    guest = str(Path(__file__).with_name("guest.py"))
    extension = Emulated([*command, guest], os.environ.get("LATENTFORGE_LIBRARY", str(library)))
    placed = extension.in_place()
    placed.__enter__()
    config.add_cleanup(lambda: (placed.__exit__(None, None, None), extension.close()))
