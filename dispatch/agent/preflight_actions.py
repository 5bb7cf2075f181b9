"""What a preflight does only when it is asked to: write to the disk, drop caches, load the GPU, call a server."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from . import bounded, locks
from .durable import sync_folder
from .paths import Root
from .preflight_stack import Interpreter

POWER_SECONDS = 15.0
_SAMPLE = 0.5
_SETTLED = 3.0
_DROP = "/proc/sys/vm/drop_caches"
_QUESTION = "--query-gpu=clocks.sm,power.draw,utilization.gpu,temperature.gpu"

_TORCH = """
import json, torch as t
x = t.randn(512, 512, device="cuda", dtype=t.bfloat16)
print(json.dumps({"torch": t.__version__, "cuda": t.version.cuda, "arches": t.cuda.get_arch_list(),
    "capability": list(t.cuda.get_device_capability()), "total": t.cuda.get_device_properties(0).total_memory,
    "mean": float((x @ x).abs().float().mean())}))
"""
_NVRTC = """
import json, torch as t
total = float(t.special.airy_ai(t.rand(8, device="cuda")).sum())
loaded = sorted({line.split()[-1] for line in open("/proc/self/maps") if "nvrtc" in line})
print(json.dumps({"sum": total, "loaded": loaded}))
"""
# 2 GiB at most: three bf16 matrices of 8192 x 8192 are 0.4 GiB.
_POWER = """
import json, time, torch as t
n = 8192
a, b = (t.randn(n, n, device="cuda", dtype=t.bfloat16) for _ in range(2))
c = a @ b
t.cuda.synchronize()
begin, count = time.monotonic(), 0
while time.monotonic() - begin < SECONDS:
    for _ in range(8):
        t.mm(a, b, out=c)
    t.cuda.synchronize()
    count += 8
print(json.dumps({"tflops": 2 * n**3 * count / (time.monotonic() - begin) / 1e12}))
"""


def write(base: Path) -> dict[str, Any]:
    """Write, fsync and rename a file in a folder of its own under `base`, and take it away again."""
    begin, step, folder = time.monotonic(), "make a folder", None
    try:
        folder = Path(tempfile.mkdtemp(prefix=".preflight-", dir=base))
        step = "write"
        with open(folder / "a", "wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            step = "fsync"
            os.fsync(file.fileno())
        (folder / "b").write_bytes(b"old")
        step = "rename"
        os.rename(folder / "a", folder / "b")
        sync_folder(folder)
        step = "read back"
        if (folder / "b").stat().st_size != 1 << 20:
            raise OSError(errno.EIO, "the renamed file has another size")
    except OSError as error:
        return {"ok": False, "step": step, "error": error.strerror, "errno": errno.errorcode.get(error.errno or 0)}
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return {"ok": True, "seconds": round(time.monotonic() - begin, 4)}


def drop_caches(root: Root, file: str = _DROP) -> dict[str, Any]:
    """Sync and drop the page cache; not while a run holds the device, and only where this user may."""
    holder = locks.holder(root.device_lock)
    if holder is not None:
        return {"done": False, "why": f"the device is leased to {holder.get('run') or 'a run'}"}
    os.sync()
    try:
        with open(file, "w") as control:
            control.write("3\n")
    except OSError as error:
        return {"done": False, "why": error.strerror}
    return {"done": True}


def torch(interpreter: Interpreter) -> dict[str, Any]:
    """A small bf16 product on the GPU by the run's own interpreter."""
    return _program(interpreter, _TORCH, 120.0)


def nvrtc(interpreter: Interpreter) -> dict[str, Any]:
    """An operator that torch compiles when it is called, and the library that did it."""
    return _program(interpreter, _NVRTC, 120.0)


def power(interpreter: Interpreter) -> dict[str, Any]:
    """Fifteen seconds of bf16 products, with clock, watts, utilisation and temperature sampled beside them."""
    samples: list[dict[str, Any]] = []
    stop = threading.Event()
    begin = time.monotonic()

    def sample() -> None:
        while not stop.is_set():
            answer = bounded.run(["nvidia-smi", _QUESTION, "--format=csv,noheader,nounits"], 5.0)
            samples.append({"at": time.monotonic() - begin, "out": answer["out"], "status": answer["status"]})
            stop.wait(_SAMPLE)

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    answer = _program(interpreter, _POWER.replace("SECONDS", str(POWER_SECONDS)), POWER_SECONDS + 120.0)
    stop.set()
    watcher.join(10.0)
    ended = time.monotonic() - begin
    # The child spends its first seconds on imports: only what was sampled while it computed counts.
    first = ended - POWER_SECONDS + _SETTLED
    return {**answer, "samples": [one["out"] for one in samples if first <= one["at"] <= ended - _SAMPLE]}


def _program(interpreter: Interpreter, program: str, seconds: float) -> dict[str, Any]:
    if interpreter.python is None:
        return {"status": "missing", "answer": None, "said": "no environment was built on this host yet"}
    ended = bounded.run([interpreter.python, "-I", "-c", program], seconds)
    answer = None
    with contextlib.suppress(ValueError, IndexError):
        answer = json.loads(ended["out"].strip().splitlines()[-1]) if ended["code"] == 0 else None
    return {"status": ended["status"], "code": ended["code"], "answer": answer, "said": ended["err"].strip()[-600:]}


def teacher_server(url: str, k: int) -> dict[str, Any]:
    """Ask an OpenAI-compatible server for `k` + 1 log-probabilities a position of a four-token prompt."""
    base = url.rstrip("/")
    try:
        listed = _json(f"{base}/models")
        name = listed["data"][0]["id"]
        question = {"model": name, "prompt": "one two three four", "max_tokens": 1, "temperature": 0}
        question |= {"logprobs": k + 1, "prompt_logprobs": k + 1, "echo": False}
        # By text, two tokens of the same spelling would count as one.
        question["return_tokens_as_token_ids"] = True
        answer = _json(f"{base}/completions", question)
    except urllib.error.HTTPError as error:
        said = error.read(400).decode("utf-8", "replace")
        return {"reached": True, "error": f"HTTP {error.code}: {said}"}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        return {"reached": False, "error": f"{type(error).__name__}: {error}"}
    choice = (answer.get("choices") or [{}])[0] if isinstance(answer, dict) else {}
    if not isinstance(choice, dict):
        return {"reached": True, "error": f"an answer that is none of a completion: {json.dumps(answer)[:200]}"}
    rows = [row for row in choice.get("prompt_logprobs") or answer.get("prompt_logprobs") or [] if row is not None]
    tops = (choice.get("logprobs") or {}).get("top_logprobs") or []
    return {
        "reached": True,
        "error": None,
        "model": name,
        "k": k,
        "prompt": [_finite(row) for row in rows],
        "next": [_finite(row) for row in tops],
    }


def _finite(row: Any) -> int:
    """How many finite log-probabilities a row holds, whichever of the two shapes it has."""
    values = row.values() if isinstance(row, dict) else ()
    numbers = [one.get("logprob") if isinstance(one, dict) else one for one in values]
    return sum(1 for one in numbers if isinstance(one, int | float) and -1e30 < one <= 1e-3)


def _json(url: str, question: dict[str, Any] | None = None) -> Any:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url!r} is not an http address")
    body = json.dumps(question).encode() if question is not None else None
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30.0) as answer:
        return json.loads(answer.read(8 << 20))
