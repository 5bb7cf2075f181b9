"""An operator's laptop gets the control plane without a compiler and without torch, with the sources to send."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from latentforge.spec.code import checkout_root, code_around

_FORBIDDEN = ("torch", "transformers", "numpy", "latentforge.kernels", "latentforge.train")
_PROBE = """
import json, sys
from latentforge.spec.code import running_code
from latentforge.contracts import load_contracts
import dispatch.planning.plan; assert load_contracts()
print(json.dumps({"digest": running_code().digest, "root": str(running_code().root), "modules": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = checkout_root(Path(__file__).parent)
    assert root is not None
    out = tmp_path_factory.mktemp("wheel")
    nowhere = tmp_path_factory.mktemp("nothing-on-path")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(out),
        ".",
    ]
    # No compiler and no CMake can be found: the build must not look for them.
    environment = {**os.environ, "LATENTFORGE_NATIVE": "OFF", "PATH": str(nowhere), "CC": "false", "CXX": "false"}
    subprocess.run(command, cwd=root, env=environment, check=True)
    (built,) = out.glob("latentforge-*.whl")
    return built


def test_the_operators_wheel_is_pure_python_and_carries_the_sources_that_a_host_builds(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.endswith("-none-any.whl")
    assert not [name for name in names if name.endswith((".so", ".pyd"))]
    for part in ("source/csrc/module.cpp", "source/CMakeLists.txt", "source/pyproject.toml", "contracts/smoke.yaml"):
        assert f"latentforge/_data/{part}" in names
    assert not [name for name in names if name.startswith(("tests/", ".ci/"))]


def test_the_wheel_names_the_same_code_as_the_checkout_and_needs_no_torch(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    # -S: the editable install's import hook of this environment stays out; its libraries are found by path alone.
    paths = os.pathsep.join([str(tmp_path / "site"), sysconfig.get_path("purelib")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    blocked = f"import sys\nfor name in {_FORBIDDEN!r}: sys.modules[name] = None\n" + _PROBE
    answer = subprocess.run(
        [sys.executable, "-S", "-P", "-c", blocked],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert f'"digest": "{code_around(Path(__file__).parent).digest}"' in answer.stdout
    assert '"root": "None"' in answer.stdout
