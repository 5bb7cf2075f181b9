"""Builds the package on a host: run there as one file by the host's own Python, under the agent's supervisor.

Standard library only, nothing of the project imported. What it makes appears whole under its final name, the marker
``.complete.json`` written last; a build that fails leaves nothing that could be taken for one.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path

GIB = 1 << 30
ONE_JOB = 2 * GIB
"""Bytes that the largest translation unit of this package takes to compile for a CPU, with room."""


def main() -> int:
    """Unpack, make or reuse the environment, build into a site folder, try it, and put it in place."""
    asked = json.loads(sys.argv[1])
    builds, venv = Path(asked["builds"]), Path(asked["venv"])
    final = builds / asked["build"]
    work = builds / f".building-{asked['build']}"
    builds.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(builds / f".lock-{asked['build']}", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if is_whole(final):
            say(f"build {asked['build']} is there already")
            products(json.loads((final / ".complete.json").read_text()))
            return 0
        if lacking := lacks():
            raise SystemExit(f"error: this host cannot build: {lacking}")
        shutil.rmtree(work, ignore_errors=True)
        source = work / "source"
        source.mkdir(parents=True)
        say("step 1/4 unpack the code")
        unpack(Path(asked["bundle"]), source)
        environment(venv, source / "constraints" / f"{asked['lock_name']}.txt", asked["lock"])
        jobs, why = compile_jobs()
        say(f"step 3/4 build the package: {why}")
        python = venv / "bin" / "python"
        site = work / "site"
        # The environment's own tools first: cmake and the build backend are pinned by the lock file.
        path = os.pathsep.join([str(venv / "bin"), os.environ.get("PATH", os.defpath)])
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--no-input", "--quiet"]
        run(
            [*pip, "--no-build-isolation", "--no-deps", "--target", str(site), str(source)],
            PATH=path,
            MAX_JOBS=str(jobs),
            CMAKE_BUILD_PARALLEL_LEVEL=str(jobs),
        )
        say("step 4/4 try what was built")
        tried = "from latentforge.spec.code import running_code as r; print(r().digest)"
        found = run([str(python), "-P", "-c", tried], PYTHONPATH=str(site), shown=False).strip()
        if found != asked["code"]:
            raise SystemExit(f"error: the built package has the code digest {found[:16]}…, asked {asked['code'][:16]}…")
        run([str(python), "-P", "-m", "latentforge", "--version"], PYTHONPATH=str(site))
        # What it can do, in its own words: compared with what a plan needs, before anything is launched.
        offered = run([str(python), "-P", "-m", "latentforge", "capabilities"], PYTHONPATH=str(site), shown=False)
        (work / "capabilities.json").write_text(json.dumps(json.loads(offered), sort_keys=True))
        shutil.rmtree(source)
        made = {"build": asked["build"], "code": asked["code"], "lock": asked["lock"], "venv": str(venv)}
        made |= {"jobs": jobs, "binaries": binaries(site)}
        mark(work, made)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(work, final)
        sync(builds)
        products(made)
    say(f"build {asked['build']} is in place")
    return 0


def lacks(path: str | None = None, headers: str | None = None) -> str:
    """What a build needs and this host has not, with the command that brings it; "" where nothing is missing.

    Asked before the environment is made: else gigabytes come down the line before a compiler is missed.
    """
    found, packages = [], []
    if importlib.util.find_spec("ensurepip") is None:
        found.append("Python's venv")
        packages.append(f"python{sys.version_info[0]}.{sys.version_info[1]}-venv")
    if os.environ.get("LATENTFORGE_NATIVE", "").lower() not in ("off", "0", "no", "false"):
        compilers = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
        if not any(shutil.which(name, path=path) for name in compilers):
            found.append(f"a C++ compiler ({', '.join(compilers)})")
            packages.append("g++")
        header = Path(headers or sysconfig.get_path("include"), "Python.h")
        if not header.is_file():
            found.append(f"Python's headers ({header})")
            packages.append(f"python{sys.version_info[0]}.{sys.version_info[1]}-dev")
    if not found:
        return ""
    return (
        f"it lacks {' and '.join(found)}. "
        f"On Debian or Ubuntu there:  sudo apt-get install {' '.join(packages)}   then the same command --attempt next"
    )


def compile_jobs(meminfo: str = "/proc/meminfo", cores: int | None = None) -> tuple[int, str]:
    """How many compilers may run at once, and why: half the cores, 8 GiB of what is free for each, and a margin.

    nvcc takes that much for a template kernel, and on unified memory a build that runs out takes the host down. A small
    host may use two cores, and runs one compiler at least, if there is memory for one at all.
    """
    cores = cores or len(os.sched_getaffinity(0))
    sizes = {}
    with open(meminfo) as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            sizes[name] = int(rest.split()[0]) << 10
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    if free < ONE_JOB:
        raise SystemExit(
            f"error: {free / GIB:.1f} GiB of memory are free, one compiler needs {ONE_JOB / GIB:.0f}: free some, then "
            "build again"
        )
    margin = min(16 * GIB, total * 12 // 100)
    jobs = max(1, min(max(cores // 2, min(cores, 2)), (free - margin) // (8 * GIB)))
    return jobs, f"{jobs} at once ({cores} cores, {free / GIB:.1f} GiB free)"


def binaries(site: Path) -> dict[str, str]:
    """sha256 of every compiled file below a folder, by its relative path."""
    found = {}
    for path in sorted(site.rglob("*.so")):
        with open(path, "rb") as stream:
            found[path.relative_to(site).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def is_whole(build: Path) -> bool:
    """Whether a build has its marker, and its compiled files are those that were marked."""
    try:
        made = json.loads((build / ".complete.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(made.get("binaries", {}) == binaries(build / "site"))


def products(made: dict[str, object]) -> None:
    """Leave what was built, by digest, among the products of the run that built it."""
    out = Path("out")
    if out.is_dir():
        (out / "build.json").write_text(json.dumps(made, sort_keys=True) + "\n")


def unpack(bundle: Path, folder: Path) -> None:
    """Unpack the plain files of a bundle into a folder; anything else in it ends the build."""
    with open(bundle, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != bundle.name:
        bundle.unlink()
        raise SystemExit(f"error: {bundle} was damaged on this host (sha256 {found[:16]}…): dropped, to be sent again")
    # By hand: extraction filters came with Python 3.11.4, and Debian 12 has 3.11.2.
    with tarfile.open(bundle) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            parts = member.name.split("/")
            if content is None or any(part in ("", ".", "..") for part in parts):
                raise SystemExit(f"error: the bundle holds {member.name!r}, which is not a plain file")
            path = folder.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as stream:
                shutil.copyfileobj(content, stream)


def environment(venv: Path, lock_file: Path, lock: str) -> None:
    """A virtual environment that holds exactly what the lock file pins, made once for each lock file."""
    venv.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(venv.parent / f".lock-{venv.name}", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if (venv / ".complete.json").is_file():
            say("step 2/4 the environment for this lock file is there")
            return
        say(f"step 2/4 install what {lock_file.name} pins (torch is the large one)")
        # An environment cannot be moved, so it is made under its final name; it counts only with its marker.
        run([sys.executable, "-m", "venv", "--clear", str(venv)])
        pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--no-input"]
        # Most of torch and transformers is never imported: bytecode is made where a module is first used.
        run([*pip, "--quiet", "--no-compile", "--requirement", str(lock_file)])
        mark(venv, {"lock": lock, "python": sys.version.split()[0]})


def run(argv: list[str], *, shown: bool = True, **changed: str) -> str:
    """Run a program to its end; its failure ends the build with its status."""
    begin = time.monotonic()
    ended = subprocess.run(
        argv,
        env={**os.environ, **changed},
        stdin=subprocess.DEVNULL,
        stdout=None if shown else subprocess.PIPE,
        text=True,
        check=False,
    )
    words = " ".join(word for word in argv[:4] if not word.startswith("/")) or argv[0]
    if ended.returncode:
        raise SystemExit(
            f"error: {words} … ended with status {ended.returncode} after {time.monotonic() - begin:.0f} s"
        )
    return ended.stdout or ""


def mark(folder: Path, content: dict[str, object]) -> None:
    """Write the marker that makes a folder count."""
    temporary = folder / ".complete.json.new"
    with open(temporary, "w") as stream:
        json.dump({**content, "made": time.time()}, stream, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    os.rename(temporary, folder / ".complete.json")
    sync(folder)


def sync(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def say(line: str) -> None:
    """One line for the log."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
