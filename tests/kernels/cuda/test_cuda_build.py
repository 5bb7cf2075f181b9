"""The CUDA part of the extension is there where it was asked for, and imports without a driver."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latentforge.errors import RefusedError
from latentforge.kernels.cuda import kd
from latentforge.kernels.native import native
from latentforge.kernels.settings import KDSettings

ROOT = Path(__file__).resolve().parents[3]
ARCHITECTURES = ("89", "90", "120", "121")


def test_the_module_says_what_it_was_built_for_and_imports_without_a_driver() -> None:
    info = native().cuda_info()
    assert info is not None, "this build has no CUDA kernels: pip install -r constraints/cuda-build.txt, make setup"
    assert info["architectures"].split() == [f"{a}-real" for a in ARCHITECTURES]
    assert tuple(int(part) for part in info["nvcc"].split("."))[:2] >= (13, 0)
    if info["devices"] == 0:
        assert info["error"] in (35, 100)  # no driver; a driver without a device
        assert info["trouble"]


def test_the_module_links_neither_the_driver_nor_a_cuda_library_nor_torch() -> None:
    linked = subprocess.run(["ldd", native().__file__], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"libcuda|libcudart|libcublas|libtorch|libc10", linked), linked


def test_what_the_cuda_backend_does_not_do_is_refused_by_name() -> None:
    logits = torch.zeros(2, 8)
    with pytest.raises(RefusedError, match="'jsd'"):
        kd.row_losses(logits, None, None, KDSettings(1.0, 1.0, direction="jsd"))
    with pytest.raises(RefusedError, match="float64"):
        kd.row_losses(logits.double(), None, None, KDSettings(1.0, 1.0))
    with pytest.raises(RefusedError, match="on cpu"):
        kd.row_losses(logits, None, None, KDSettings(1.0, 1.0))
    with pytest.raises(RefusedError, match="524288"):
        kd.row_losses(torch.zeros(1, 1).expand(1, 524289), None, None, KDSettings(1.0, 1.0))


def configure(tmp_path: Path, *options: str, path: str = "/usr/bin:/bin") -> subprocess.CompletedProcess[str]:
    """CMake's first step alone, seeing no more of the machine's compilers than ``path``."""
    import pybind11

    prefix = tmp_path / "python"
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", *options]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": path, "HOME": str(prefix)})


def test_asking_for_cuda_without_a_usable_compiler_says_so_and_what_to_do(tmp_path: Path) -> None:
    old = tmp_path / "nvcc"
    old.write_text(
        '#!/bin/sh\ncase "$*" in *dryrun*) echo "#\\$ TOP=/nowhere" >&2;; *) echo "release 12.4, V12.4.131";; esac\n'
    )
    old.chmod(0o755)
    done = configure(tmp_path, "-DLATENTFORGE_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={old}")
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert "12.4.131" in said
    assert "constraints/cuda-build.txt" in said


def test_a_switch_that_is_none_is_refused(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DLATENTFORGE_CUDA=YES")
    assert done.returncode != 0
    assert "LATENTFORGE_CUDA=YES" in done.stderr
