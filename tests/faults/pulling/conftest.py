"""The hub of tests/pulling, for its faults."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from _pytest.fixtures import FixtureFunctionDefinition

_spec = importlib.util.spec_from_file_location(
    "latentforge_faults_hub", Path(__file__).parents[2] / "pulling/conftest.py"
)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)
_OURS = ("hub", "on_host", "contents", "fault", "pulled_files", "model")
globals().update({name: vars(_module)[name] for name in _OURS})
assert all(isinstance(globals()[name], FixtureFunctionDefinition) for name in _OURS)
