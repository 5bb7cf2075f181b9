"""Builds the extension for aarch64 on this machine, and gathers an arm64 Python that can import it under qemu.

    python tests/kernels/aarch64/cross.py       prints the command that runs the arm64 Python, and the module's path

Debian or Ubuntu with ``g++-aarch64-linux-gnu`` and ``qemu-user-static`` (``.ci/run`` installs them). The arm64 Python
is fetched from the archive that this machine's apt uses, into its own folder: nothing of the system changes, root is
not needed. Everything lies under ``build/aarch64`` and is used again: the Python for the same list of packages, the
objects as far as ninja finds them fresh.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
HOME = ROOT / "build" / "aarch64"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
# What apt resolves from an empty machine; the extension needs libstdc++, ctypes libffi.
PACKAGES = ("python3-minimal", "libpython3-dev", "libpython3-stdlib", "libstdc++6")


class Missing(Exception):
    """What this machine lacks for the cross build; the text names it and what to do."""


def require_tools() -> None:
    """Raise Missing where the compiler, the emulator or apt is not installed."""
    packages = {COMPILER: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user-static", "apt-get": "apt", "dpkg": "dpkg"}
    lacking = [f"{tool} (package {package})" for tool, package in packages.items() if shutil.which(tool) is None]
    if lacking:
        raise Missing(f"the aarch64 tests need {', '.join(lacking)}: .ci/run installs them")


@contextmanager
def _alone() -> Iterator[None]:
    """One process at a time builds here."""
    HOME.mkdir(parents=True, exist_ok=True)
    with (HOME / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=HOME)
    if done.returncode != 0:
        raise Missing(f"{what} failed ({done.returncode}): {(done.stdout + done.stderr)[-1500:]}")


def python_root() -> Path:
    """The folder that holds the arm64 Python; fetched on the first call."""
    release = Path("/etc/os-release")
    key = hashlib.sha256(repr((PACKAGES, release.read_text() if release.exists() else "")).encode()).hexdigest()[:12]
    root = HOME / f"python-{key}"
    if root.exists():
        return root
    work = HOME / "fetching"
    shutil.rmtree(work, ignore_errors=True)
    for part in ("lists/partial", "debs/partial", "root"):
        (work / part).mkdir(parents=True)
    (work / "status").touch()  # nothing counts as installed: apt resolves the whole chain
    options = [
        "Dir::Cache::pkgcache=",
        "Dir::Cache::srcpkgcache=",
        "APT::Architecture=arm64",
        "APT::Architectures=arm64",
        "APT::Sandbox::User=",
        f"Dir::State={work}",
        f"Dir::State::Lists={work}/lists",
        f"Dir::State::status={work}/status",
        f"Dir::Cache::archives={work}/debs",
        "Acquire::Languages=none",
        "Acquire::http::Timeout=20",
        "Debug::NoLocking=true",
    ]
    apt = ["apt-get", "-q", *(word for option in options for word in ("-o", option))]
    _run([*apt, "update"], "asking the package archive for arm64 packages")
    _run([*apt, "install", "-y", "--download-only", "--no-install-recommends", *PACKAGES], "fetching an arm64 Python")
    for package in sorted((work / "debs").glob("*.deb")):
        _run(["dpkg", "-x", str(package), str(work / "root")], f"unpacking {package.name}")
    os.replace(work / "root", root)
    shutil.rmtree(work)
    return root


def _of_environment(tool: str) -> str:
    """The path of a build tool, this Python environment's own before the system's."""
    found = shutil.which(tool, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        raise Missing(f"{tool} is missing: make setup")
    return found


def configure(root: Path, build: Path) -> None:
    """Configure the cross build of this checkout in ``build``, once."""
    if (build / "build.ninja").exists():
        return
    import pybind11

    cmake, ninja = _of_environment("cmake"), _of_environment("ninja")
    settings = {
        "CMAKE_TOOLCHAIN_FILE": Path(__file__).with_name("toolchain.cmake"),
        "CMAKE_MAKE_PROGRAM": ninja,
        "LATENTFORGE_SYSROOT": root,
        "LATENTFORGE_CUDA": "OFF",
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "Python_EXECUTABLE": sys.executable,
    }
    defined = [f"-D{name}={value}" for name, value in settings.items()]
    _run([cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *defined], "configuring the cross build")


def build(root: Path) -> Path:
    """The extension for aarch64, built as far as it is not fresh."""
    folder = HOME / f"module-{root.name.removeprefix('python-')}"
    configure(root, folder)
    done = subprocess.run([_of_environment("ninja"), "-C", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:  # not a reason to skip: the sources do not compile for aarch64
        raise RuntimeError(f"the cross build failed:\n{done.stdout[-6000:]}{done.stderr[-2000:]}")
    return folder / "_native.so"


def mutant(root: Path, unit: str, edit: tuple[str, str, str] | None = None, flags: tuple[str, ...] = ()) -> Path:
    """The built module with a planted fault: ``edit`` is (file, old text, new text) as ``unit`` sees that file.

    Paths are below csrc. Only that unit is compiled again (at -O1; ``flags`` come last) and linked with
    the objects that are there.
    """
    built = build(root)
    digest = hashlib.sha256(repr((built.stat().st_mtime_ns, unit, edit, flags)).encode()).hexdigest()[:16]
    folder = HOME / "faults" / digest
    library = folder / built.name
    if library.exists():
        return library
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    if edit is not None:
        file, old, new = edit
        text = (folder / "csrc" / file).read_text()
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in csrc/{file}"
        (folder / "csrc" / file).write_text(text.replace(old, new))
    listed = subprocess.run(
        [_of_environment("ninja"), "-C", str(built.parent), "-t", "compdb"], capture_output=True, text=True, check=True
    )
    commands = {entry["output"]: entry for entry in json.loads(listed.stdout)}
    (compiled,) = [one for one in commands.values() if one["file"] == str(ROOT / "csrc" / unit)]
    command = compiled["command"].replace(str(ROOT / "csrc"), str(folder / "csrc")).replace("-O3", "-O1")
    command = " ".join([command.replace(compiled["output"], str(folder / "unit.o")), *flags])
    link = commands[built.name]["command"].replace(compiled["output"], str(folder / "unit.o"))
    link = link.replace(f"-o {built.name}", f"-o {library}")
    for step in (command, link):
        subprocess.run(step, shell=True, check=True, cwd=built.parent)
    return library


def interpreter(root: Path, processor: str = "max") -> list[str]:
    """The command that runs the arm64 Python on an emulated processor."""
    (python,) = [path for path in (root / "usr" / "bin").glob("python3.*") if path.name[8:].isdigit()]
    return [EMULATOR, "-cpu", processor, "-L", str(root), str(python), "-I", "-B"]


def ready() -> tuple[Path, Path]:
    """(folder of the arm64 Python, the built module); Missing says why there is none on this machine."""
    require_tools()
    with _alone():
        root = python_root()
        return root, build(root)


if __name__ == "__main__":
    arm_root, module = ready()
    print(" ".join(interpreter(arm_root)), module)
