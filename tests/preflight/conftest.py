"""GB10 hosts as they answer: a fake `nvidia-smi` (and its neighbours) on PATH with recorded shapes; all else is real.

The shapes are those that the field notes tell: N/A for each of the GPU's memory fields, 96 % at 19 W, a driver that
hangs, a list of processes that is empty while a server sits on the memory.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.hosts.facts import HostFacts
from dispatch.hosts.inventory import Host
from dispatch.places import Places
from dispatch.preflight.asking import facts_of, question
from dispatch.preflight.check import Report
from dispatch.preflight.facts import PreflightFacts
from dispatch.preflight.judge import judge
from dispatch.transport.open import open_transport

GIB = 2**30
GB10: dict[str, str] = json.loads(Path(__file__).with_name("gb10.json").read_text())
BANNER = "| NVIDIA-SMI 580.142    Driver Version: 580.142    CUDA Version: 13.0 |\n"
_SMI = """\
#!{python} -SsE
import json, os, sys, time
shape = json.load(open({shape!r}))
with open({calls!r}, "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if shape.get("hang"):
    time.sleep(600)
if shape.get("code"):
    sys.exit(print(shape.get("says", "")) or shape["code"])
for word in sys.argv[1:]:
    if word.startswith("--query-gpu="):
        fields = word.partition("=")[2].split(",")
        print(", ".join(shape["gpu"].get(field, "[N/A]") for field in fields))
        break
    if word.startswith("--query-compute-apps="):
        sys.stdout.write(shape.get("apps", ""))
        break
else:
    sys.stdout.write(shape.get("banner", ""))
"""


class FakeGpu:
    """The programs of a GB10 host, and what they answer next."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.calls = folder / "calls"
        self.shape: dict[str, Any] = {"gpu": dict(GB10), "apps": "", "banner": BANNER}
        program = _SMI.format(python=sys.executable, shape=str(folder / "shape.json"), calls=str(self.calls))
        self.put("nvidia-smi", program)
        self.write()

    def write(self, **changes: Any) -> None:
        """Change what nvidia-smi answers; a dict changes fields of the GPU."""
        for name, value in changes.items():
            self.shape[name] = {**self.shape["gpu"], **value} if name == "gpu" else value
        (self.folder / "shape.json").write_text(json.dumps(self.shape))

    def put(self, name: str, program: str) -> None:
        """Another program beside it."""
        path = self.bin / name
        path.write_text(program)
        path.chmod(0o755)

    def says(self, name: str, text: str, code: int = 0) -> None:
        """A program that prints a text and ends with a code."""
        (self.folder / f"{name}.txt").write_text(text)
        self.put(name, f"#!/bin/sh\ncat '{self.folder}/{name}.txt'\nexit {code}\n")


@pytest.fixture
def gb10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """This machine, with the programs of a GB10."""
    made = FakeGpu(tmp_path)
    monkeypatch.setenv("PATH", f"{made.bin}{os.pathsep}{os.environ['PATH']}")
    return made


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """The host `local` with a state root of this test's."""
    return Host(name="local", root=str(tmp_path / "root"))


Probe = Callable[..., tuple[Report, HostFacts]]


@pytest.fixture
def probe(host: Host, tmp_path: Path) -> Probe:
    """Ask the real agent once, and judge what it answers."""
    places = Places.from_environment({"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "laptop")})

    def ask(*only: str, where: Host | None = None, verb: str = "preflight", **more: Any) -> tuple[Report, HostFacts]:
        place = where or host
        asked = question(place, only=frozenset(only), act=verb == "preflight") | more
        transport = open_transport(place, places)
        try:
            facts = facts_of(transport, verb, {"preflight": asked}, timeout=90.0)
        finally:
            transport.close()
        return judge(facts, place, asked=only), facts

    return ask


BOX = Host(name="box", address="127.0.0.1", root="/r", gb10=True)


@pytest.fixture(name="facts_with")
def _facts_with() -> Callable[..., HostFacts]:
    return facts_with


@pytest.fixture
def box() -> Host:
    """A host that is declared a GB10."""
    return BOX


def facts_with(*, machine: dict[str, Any] | None = None, **groups: Any) -> HostFacts:
    """Facts as an agent would send them, of a GB10 on which nothing is wrong, with some groups replaced."""
    host = {"hostname": "h", "arch": "aarch64", "cores": 20, "mem_total": 122 * GIB, "mem_available": 112 * GIB}
    host |= {"disk_free": 900 * GIB, "gpus": [{"name": "NVIDIA GB10"}], **(machine or {})}
    answer: dict[str, Any] = {
        "commands": {
            "gpu": {"status": "ended", "code": 0, "out": ", ".join(GB10.values()) + "\n"},
            "apps": {"status": "ended", "code": 0, "out": ""},
            "banner": {"status": "ended", "code": 0, "out": BANNER},
            "nvcc": {"status": "ended", "code": 0, "out": "Cuda compilation tools, release 13.0, V13.0.88\n"},
            "nvcc-targets": {"status": "ended", "code": 0, "out": "sm_90\nsm_120\nsm_121\n"},
            "journal": {"status": "ended", "code": 0, "out": "2026-11-01T10:00:00+0000 h kernel: all is well\n"},
            "firmware": {"status": "ended", "code": 2, "out": ""},
        },
        "did": {},
        "storage": {
            "root": "/r", "exists": True, "base": "/r", "filesystem": "ext4", "owner": 1000, "uid": 1000, "mode": 0o700,
            "writable": True, "read_only": False, "noexec": False, "bytes_free": 900 * GIB, "inodes_free": 10**7,
            "unnamed": "ok",
        },
        "memory": {
            "numbers": {"MemTotal": 122 * GIB, "MemFree": 100 * GIB, "Cached": 6 * GIB, "CmaTotal": 1 * GIB},
            "swaps": [], "swappiness": 60,
        },
        "clock": {"synchronised": True},
        "session": {"systemd": True, "linger": True, "sshd": -1000, "watchdog": True},
        "platform": {
            "arch": "aarch64", "kernel": "6.17.0-1014-nvidia", "id": "ubuntu", "version": "24.04",
            "pretty": "Ubuntu 24.04.3 LTS", "dgx": "7.5.0",
        },
        "tenants": {"processes": [], "unseen": 0, "devices": True, "lease": None, "ours": []},
        "capabilities": {"source": None},
        "caches": [{"variable": "TRITON_CACHE_DIR", "path": "/home/u/.triton", "filesystem": "ext4", "writable": True}],
        "reboot": False,
        "link": [],
        "triton": {
            "version": "3.8.0", "variables": {}, "ptxas": "/v/ptxas-blackwell",
            "assembled": {"status": "ended", "code": 0},
        },
        "binaries": {
            "lister": "/v/cuobjdump", "third": {},
            "own": [{"path": "/v/_native.so", "cudart12": False, "elf": ["ELF file 1: a.1.sm_121.cubin"], "ptx": []}],
        },
        "received": 1000.0,
        "answered": 1000.2,
    }  # fmt: skip
    for name, value in groups.items():
        known = answer.get(name)
        answer[name] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    return HostFacts.model_validate(
        {
            "host": host,
            "python": {"executable": "/usr/bin/python3", "version": "3.12.3"},
            "root": "/r",
            "preflight": PreflightFacts.of(answer, asked=999.9, heard=answer.pop("heard", 1000.3)),
        }
    )
