"""The extension belongs to no torch and to no CUDA installation, and its sources travel whole."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pybind11
import pytest

from latentforge.kernels.native import native
from latentforge.spec.code import checkout_root

ROOT = checkout_root(Path(__file__).parent) or Path()
# The C and C++ run-time libraries. libpython is not among them either: the interpreter has those names.
ALLOWED = re.compile(r"^(libstdc\+\+|libm|libgcc_s|libc|libpthread|libdl|librt|ld-linux-[\w-]+)\.so\.\d+$")


def needed(library: Path) -> list[str]:
    """The libraries that the loader must find before this one can be used."""
    listing = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", listing)


def foreign(library: Path) -> list[str]:
    """Those of them that tie the extension to more than the C++ run time."""
    return [name for name in needed(library) if not ALLOWED.match(name)]


def test_the_extension_links_the_c_and_cpp_run_time_and_nothing_else() -> None:
    assert needed(Path(str(native().__file__)))
    assert foreign(Path(str(native().__file__))) == []


def test_a_library_that_links_torch_is_noticed() -> None:
    import torch

    assert foreign(Path(torch.__file__).parent / "lib" / "libtorch_python.so")


def test_the_extension_asks_for_no_name_of_torch_python_internals_or_a_driver() -> None:
    symbols = ["nm", "-D", "--undefined-only", "--demangle", str(native().__file__)]
    wanted = subprocess.run(symbols, capture_output=True, text=True, check=True).stdout
    assert " PyErr_" in wanted
    assert not re.search(r"\b(c10|at|torch)::|\b(THP|aoti_torch|cublas|cu(da)?[A-Z])", wanted)


def test_the_extension_is_imported_without_torch() -> None:
    code = (
        "import sys, importlib.util as u; sys.modules['torch'] = None\n"
        "spec = u.spec_from_file_location('_native', sys.argv[1]); module = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(module); print(module.cpu_variants()[-1])"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(native().__file__)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "baseline\n"


def compile_commands(tmp_path: Path, *options: str) -> str:
    """What a build with these options would run; nothing is compiled."""
    build = tmp_path / "build"
    command = ["cmake", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-G", "Ninja", *options]
    subprocess.run(command, capture_output=True, text=True, check=True)
    listed = subprocess.run(["ninja", "-C", str(build), "-t", "compdb"], capture_output=True, text=True, check=True)
    return "\n".join(entry["command"] for entry in json.loads(listed.stdout))


def test_cuda_is_left_out_where_it_is_switched_off_or_no_compiler_is_new_enough(tmp_path: Path) -> None:
    assert "nvcc" not in compile_commands(tmp_path / "off", "-DLATENTFORGE_CUDA=OFF")
    old = tmp_path / "nvcc"
    old.write_text(
        '#!/bin/sh\ncase "$*" in *dryrun*) echo "#\\$ TOP=/nowhere" >&2;; *) echo "release 12.4, V12.4.131";; esac\n'
    )
    old.chmod(0o755)
    commands = compile_commands(tmp_path / "auto", f"-DCMAKE_CUDA_COMPILER={old}")
    assert "nvcc" not in commands
    assert "kd_baseline.cpp" in commands


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The files of the source distribution, below its top folder."""
    out = tmp_path_factory.mktemp("sdist")
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT, check=True, capture_output=True)
    (archive,) = out.glob("latentforge-*.tar.gz")
    with tarfile.open(archive) as tar:
        return [name.split("/", 1)[1] for name in tar.getnames() if "/" in name]


def test_the_source_distribution_holds_every_source_that_the_build_reads(sdist: list[str]) -> None:
    sources = [path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    sources = [path for path in sources if "__pycache__" not in path]
    assert {"csrc/module.cpp", "csrc/gumbel.h", "csrc/cpu/simd_neon.h"} <= set(sources)
    missing = set(sources) | {"CMakeLists.txt", "pyproject.toml", "constraints/cuda-build.txt"}
    assert sorted(missing - set(sdist)) == []
    assert not [name for name in sdist if name.startswith(("tests/", ".ci/", "build/"))]
