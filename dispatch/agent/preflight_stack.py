"""The software that a run would meet on this host: its interpreter, Triton's assembler, compiled extensions, models."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

from . import bounded
from .durable import read_json
from .paths import NAME, Root, expand
from .protocol import AgentError
from .pulling import MODEL

_PTX = """.version 8.8
.target sm_121a
.address_size 64
.visible .entry nothing() { ret; }
"""
_THIRD = ("bitsandbytes", "flash_attn", "vllm", "flashinfer")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_MOST = 40


class Interpreter:
    """The Python that runs are started with, and the built package that they import."""

    def __init__(self, python: str | None, site: str | None) -> None:
        self.python = python
        self.site = Path(site) if site else None
        found = sorted(Path(python).parent.parent.glob("lib/python3*/site-packages")) if python else []
        self.packages = found[0] if found else None

    @classmethod
    def of(cls, root: Root, python: str | None, build: str | None, venv: str | None) -> Interpreter:
        """The one named by the laptop (a path, or a build and its environment); else the newest that is complete."""
        if python is not None:
            return cls(str(expand(python, "python")), None)
        environment = _complete(root.venvs, venv)
        built = _complete(root.builds, build)
        interpreter = environment / "bin" / "python" if environment else None
        return cls(
            str(interpreter) if interpreter and os.access(interpreter, os.X_OK) else None,
            str(built / "site") if built else None,
        )

    @property
    def environment(self) -> dict[str, str]:
        """What a program of this interpreter is started with."""
        return {"PYTHONPATH": str(self.site)} if self.site else {}


def _complete(folder: Path, name: str | None) -> Path | None:
    if name is not None:
        if not NAME.fullmatch(name):
            raise AgentError("refused", f"{name!r} is not a plain name")
        return folder / name if (folder / name / ".complete.json").is_file() else None
    found = sorted(folder.glob("*/.complete.json"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None


def capabilities(interpreter: Interpreter) -> dict[str, Any]:
    """What the built `latentforge` can do, in its own words: those kept beside the build, else it is asked now."""
    if interpreter.site is not None:
        kept = read_json(interpreter.site.parent / "capabilities.json")
        if kept is not None:
            return {"source": "build", "offered": kept}
    if interpreter.python is None or (interpreter.site is None and interpreter.packages is None):
        return {"source": None, "offered": None}
    argv = [interpreter.python, "-P", "-m", "latentforge", "capabilities"]
    answer = bounded.run(argv, 20.0, env=interpreter.environment)
    try:
        offered = json.loads(answer["out"]) if answer["code"] == 0 else None
    except ValueError:
        offered = None
    offered = offered if isinstance(offered, dict) else None
    said = (answer["err"] or answer["out"]).strip()[-400:] if offered is None else ""
    return {"source": "asked", "offered": offered, "status": answer["status"], "code": answer["code"], "said": said}


def triton(interpreter: Interpreter, *, assemble: bool) -> dict[str, Any]:
    """Triton's version, its assemblers, the variables that choose others, and whether an empty sm_121a kernel goes
    through."""
    variables = {name: value for name, value in os.environ.items() if name.startswith("TRITON_")}
    folder = interpreter.packages / "triton" if interpreter.packages else None
    if folder is None or not folder.is_dir():
        return {"version": None, "variables": variables}
    names = (
        sorted(path.name for path in interpreter.packages.glob("triton-*.dist-info")) if interpreter.packages else []
    )
    version = names[0].removeprefix("triton-").removesuffix(".dist-info") if names else None
    programs = folder / "backends" / "nvidia" / "bin"
    own = programs / "ptxas-blackwell"
    default = variables.get("TRITON_PTXAS_PATH") or str(programs / "ptxas")
    chosen = variables.get("TRITON_PTXAS_BLACKWELL_PATH") or (str(own) if own.exists() else default)
    found: dict[str, Any] = {"version": version, "variables": variables, "ptxas": chosen}
    found["programs"] = sorted(path.name for path in programs.glob("*")) if programs.is_dir() else []
    if assemble:
        found["assembled"] = _assembled(chosen)
    return found


def _assembled(ptxas: str) -> dict[str, Any]:
    """An empty kernel through an assembler; the source is a file in memory, so that nothing is written anywhere."""
    if not hasattr(os, "memfd_create"):
        return {"status": "missing", "code": None, "out": "", "err": "", "seconds": 0.0}
    source = os.memfd_create("empty.ptx")
    try:
        os.write(source, _PTX.encode())
        path = f"/proc/{os.getpid()}/fd/{source}"
        return bounded.run([ptxas, "-arch=sm_121a", "-o", "/dev/null", path], 20.0)
    finally:
        os.close(source)


def binaries(interpreter: Interpreter) -> dict[str, Any]:
    """The machine code inside our extension and inside those of others, as `cuobjdump` lists it."""
    lister = bounded.find("cuobjdump")
    if lister is None and interpreter.packages is not None:
        bundled = interpreter.packages / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
        lister = str(bundled) if bundled.exists() else None
    own = [path for base in (interpreter.site, interpreter.packages) if base for path in base.glob("latentforge/*.so")]
    third = {}
    for name in _THIRD if interpreter.packages else ():
        files = sorted((interpreter.packages / name).rglob("*.so")) if interpreter.packages else []
        if files:
            third[name] = [_binary(path, lister) for path in files[:_MOST]]
    return {"lister": lister, "own": [_binary(path, lister) for path in own[:1]], "third": third}


def _binary(path: Path, lister: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"path": str(path), "cudart12": _mentions(path, b"libcudart.so.12\0")}
    if lister is not None:
        for name, flag in (("elf", "--list-elf"), ("ptx", "--list-ptx")):
            answer = bounded.run([lister, flag, str(path)], 20.0)
            # Without code of that kind it says so, with a status that differs between versions.
            none = "does not contain device code" in answer["out"] + answer["err"] or "file found" in answer["err"]
            found[name] = answer["out"].splitlines() if answer["code"] == 0 or none else None
    return found


def _mentions(path: Path, needle: bytes) -> bool | None:
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(needle) >= 0
    except (OSError, ValueError):
        return None


def model(path: str, root: Root) -> dict[str, Any]:
    """A model's `config.json` and the size of its weights, nothing hashed; `reason` where there is no model.

    `path` is a folder, or the name of a pulled model as a pipeline has it (repository@commit).
    """
    try:
        name = path.replace("/", "--")
        folder = root.models / name / "files" if MODEL.fullmatch(name) else expand(path, "model")
        config = json.loads((folder / "config.json").read_bytes())
        weights = sum(one.stat().st_size for one in folder.iterdir() if one.suffix in _WEIGHTS)
    except AgentError as error:
        return {"config": None, "bytes": None, "reason": error.message}
    except OSError as error:
        return {"config": None, "bytes": None, "reason": f"{error.filename or path}: {error.strerror}"}
    except ValueError as error:
        return {"config": None, "bytes": None, "reason": f"{path}/config.json is not JSON: {error}"}
    if not isinstance(config, dict):
        return {"config": None, "bytes": None, "reason": f"{path}/config.json is not an object"}
    return {"config": config, "bytes": weights, "reason": None}
