"""A build that is killed at any moment leaves nothing that would be used, and the next one is whole."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_PROGRAM = Path(__file__).parents[3] / "dispatch" / "building" / "host_build.py"
GIB = 1 << 30
# The build program with its slow steps played: every call of it may be the last, and the binary comes in two halves.
_DRIVER = """
import importlib.util, json, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("host_build", sys.argv[2])
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
left = 0
def tick():
    global left
    left -= 1
    if left == 0: os.kill(os.getpid(), 9)
def ticking(function):
    def called(*words, **more):
        tick()
        return function(*words, **more)
    return called
def run(argv, *, shown=True, **changed):
    if "venv" in argv:
        (Path(argv[-1]) / "bin").mkdir(parents=True, exist_ok=True)
        tick()
        (Path(argv[-1]) / "bin" / "python").write_text("#!/bin/sh\\n")
    if "--target" in argv:
        assert changed["MAX_JOBS"] == changed["CMAKE_BUILD_PARALLEL_LEVEL"] >= "1"
        site = Path(argv[argv.index("--target") + 1])
        (site / "latentforge").mkdir(parents=True)
        with open(site / "latentforge" / "_native.so", "wb", buffering=0) as file:
            file.write(b"half of the code")
            tick()
            file.write(b", and the other")
    if "capabilities" in argv:
        return "{}"
    return json.loads(sys.argv[1])["code"] if "-c" in argv else ""
build.run = ticking(run)
for name in ("say", "unpack", "mark", "sync", "binaries", "products"):
    setattr(build, name, ticking(getattr(build, name)))
build.os.rename = ticking(os.rename)
for one in json.loads(sys.argv[1]):  # a process each: what has begun is not begun again
    child = os.fork()
    if child == 0:
        left, sys.argv[1] = one["die_at"], json.dumps(one)
        os.chdir(one["folder"])
        code = build.main()
        print("calls", one["die_at"] - left, flush=True)
        os._exit(code)
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
_BINARY = hashlib.sha256(b"half of the code, and the other").hexdigest()


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("host_build_under_test", _PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Place:
    """A host's folders, and a build for them."""

    def __init__(self, host: Any, folder: Path) -> None:
        self.host, self.folder = host, folder
        self.builds = host.root.builds
        (folder / "out").mkdir(parents=True)
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz") as archive:
            entry = tarfile.TarInfo("constraints/cpu.txt")
            archive.addfile(entry, io.BytesIO(b""))
        self.bundle = folder / hashlib.sha256(content.getvalue()).hexdigest()
        self.bundle.write_bytes(content.getvalue())
        self.asked = {
            "builds": str(self.builds),
            "build": "code-lock",
            "venv": str(host.root.venvs / "lock"),
            "bundle": str(self.bundle),
            "code": "c0de",
            "lock": "10c4",
            "lock_name": "cpu",
        }

    def binary(self) -> str:
        """The digest of the built file."""
        return hashlib.sha256((self.builds / "code-lock/site/latentforge/_native.so").read_bytes()).hexdigest()

    def dying(self, at: int = 10_000) -> dict[str, Any]:
        """A build of this place that is killed at the n-th call."""
        return {**self.asked, "folder": str(self.folder), "die_at": at}

    def is_used(self) -> bool:
        """Whether a plan would take the build for there."""
        found: bool = self.host.call("probe", builds=["code-lock"])["builds"]["code-lock"]
        return found


def run(*builds: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Build one after the other; how each ended, and how many calls each made that was not killed."""
    argv = [sys.executable, "-I", "-S", "-c", _DRIVER, json.dumps(builds), str(_PROGRAM)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=300)
    words = [line.split() for line in done.stdout.splitlines()]
    return [int(w[1]) for w in words if w[0] == "status"], [int(w[1]) for w in words if w[0] == "calls"]


def test_a_build_killed_at_any_moment_is_whole_or_not_used_and_the_next_one_is_whole(host: Any, tmp_path: Path) -> None:
    (status,), (total,) = run(Place(host, tmp_path / "count").dying())
    assert (status, total > 15) == (0, True)
    places = []
    for moment in range(1, total + 1):
        (tmp_path / str(moment)).mkdir()
        places.append(Place(type(host)(tmp_path / str(moment)), tmp_path / str(moment)))
    ended, _ = run(*(place.dying(moment) for moment, place in enumerate(places, 1)))
    assert ended == [-signal.SIGKILL] * total
    used = [place.is_used() for place in places]
    assert all(place.binary() == _BINARY for place, whole in zip(places, used, strict=True) if whole)
    # Only what is killed after the last rename may count.
    assert used == sorted(used)
    assert 0 < used.count(True) <= 4
    ended, _ = run(*(place.dying() for place in places))
    assert ended == [0] * total
    for place in places:
        assert place.is_used()
        assert place.binary() == _BINARY
        made = json.loads((place.folder / "out" / "build.json").read_text())
        assert made["binaries"] == {"latentforge/_native.so": _BINARY}
        assert [path.name for path in place.builds.iterdir() if path.name.startswith(".building")] == []


def test_another_binary_in_the_place_of_the_built_one_makes_it_no_build(host: Any, tmp_path: Path) -> None:
    place = Place(host, tmp_path / "one")
    run(place.dying())
    binary = place.builds / "code-lock" / "site" / "latentforge" / "_native.so"
    binary.write_bytes(b"an older build")
    assert not place.is_used()
    assert run(place.dying())[0] == [0]  # and the next build does not take it for one either
    assert place.binary() == _BINARY
    assert place.is_used()
    binary.unlink()
    assert not place.is_used()


@pytest.mark.parametrize(
    ("total", "free", "cores", "jobs"),
    [
        (128, 119, 20, 10),  # half the cores of a GB10
        (128, 60, 20, 5),
        (128, 30, 20, 1),
        (128, 17, 20, 1),
        (24, 20, 2, 2),
        (24, 8, 2, 1),
        (24, 20, 16, 2),
        (8, 6, 8, 1),
        (512, 400, 1, 1),
    ],
)
def test_compilers_are_as_many_as_memory_holds(
    program: Any, tmp_path: Path, total: int, free: int, cores: int, jobs: int
) -> None:
    text = f"MemTotal: {total * GIB >> 10} kB\nMemAvailable: {free * GIB >> 10} kB\n"
    (tmp_path / "meminfo").write_text(text)
    found, why = program.compile_jobs(str(tmp_path / "meminfo"), cores)
    assert found == jobs
    assert f"{jobs} at once ({cores} cores, {free}.0 GiB free)" in why


def test_a_host_without_memory_for_one_compiler_is_refused_with_the_figure(program: Any, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: {128 * GIB >> 10} kB\nMemAvailable: {GIB >> 10} kB\n")
    with pytest.raises(SystemExit, match=r"1\.0 GiB of memory are free, one compiler needs 2"):
        program.compile_jobs(str(tmp_path / "meminfo"), 20)


def test_a_bundle_that_was_damaged_on_the_host_is_dropped_and_not_unpacked(
    program: ModuleType, host: Any, tmp_path: Path
) -> None:
    place = Place(host, tmp_path / "place")
    with open(place.bundle, "ab") as stream:
        stream.write(b"x")
    with pytest.raises(SystemExit, match=r"was damaged on this host .*: dropped, to be sent again"):
        program.unpack(place.bundle, tmp_path / "source")
    assert not place.bundle.exists(), "else every later build would take it"
    assert not (tmp_path / "source").exists()


def test_a_host_without_a_compiler_or_headers_is_told_so_before_anything_is_fetched(
    program: ModuleType, host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("LATENTFORGE_NATIVE", raising=False)
    told = program.lacks(str(tmp_path), str(tmp_path))
    for word in ("a C++ compiler (c++, g++, clang++)", str(tmp_path / "Python.h"), "apt-get install g++ python3"):
        assert word in told
    assert "--attempt next" in told
    (tmp_path / "clang++").touch(0o755)
    (tmp_path / "Python.h").touch()
    assert program.lacks(str(tmp_path), str(tmp_path)) == ""
    monkeypatch.setenv("CXX", "ccache g++")
    assert "a C++ compiler (ccache)" in program.lacks(str(tmp_path), str(tmp_path))
    monkeypatch.setenv("LATENTFORGE_NATIVE", "OFF")
    assert program.lacks(str(tmp_path / "none"), str(tmp_path / "none")) == ""
    monkeypatch.setattr(program, "lacks", lambda: "it lacks a C++ compiler")
    asked = Place(host, tmp_path / "place").asked
    monkeypatch.setattr(sys, "argv", ["host_build.py", json.dumps(asked)])
    with pytest.raises(SystemExit, match="error: this host cannot build: it lacks a C"):
        program.main()
    assert not Path(asked["venv"]).exists()
