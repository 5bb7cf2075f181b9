"""Print the CUDA compiler to use and its version (run by CMake; standard library only).

In this order: the one that is named (argument, or CUDACXX), ``nvcc`` on PATH, the pip package ``nvidia-cuda-nvcc`` of
this interpreter (constraints/cuda-build.txt). Prints ``<nvcc>;<major.minor.patch>;<toolkit folder>``, or nothing.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def candidates(named: str) -> list[str]:
    if named:
        return [named]
    found = [shutil.which("nvcc") or ""]
    try:
        package = find_spec("nvidia")
    except ImportError:
        package = None
    if package is not None:
        found += [str(Path(folder) / "cu13" / "bin" / "nvcc") for folder in package.submodule_search_locations or []]
    return [nvcc for nvcc in found if nvcc]


def describe(nvcc: str) -> str | None:
    """``nvcc`` may be a wrapper, so the compiler itself is asked where its toolkit is."""
    try:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        plan = subprocess.run([nvcc, "-dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    number = re.search(r"V(\d+\.\d+\.\d+)", version)
    top = re.search(r"^#\$ TOP=(.*)$", plan.stderr, re.MULTILINE)
    if number is None or top is None:
        return None
    return f"{nvcc};{number[1]};{Path(top[1].strip()).resolve()}"


def main() -> None:
    named = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] else os.environ.get("CUDACXX", "")
    found = [described for described in map(describe, candidates(named)) if described is not None]
    # An old toolkit of the machine does not hide a new one from pip; alone, it is named in the error.
    new_enough = [described for described in found if int(described.split(";")[1].split(".")[0]) >= 13]
    print(*(new_enough or found)[:1], end="")


if __name__ == "__main__":
    main()
