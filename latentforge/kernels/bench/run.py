"""One run of the bench: the work asked for, on each number of threads, in one process."""

from __future__ import annotations

import datetime
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from latentforge.errors import RefusedError
from latentforge.kernels.bench import decode, kd, linear
from latentforge.kernels.bench.contest import keep_large_blocks
from latentforge.kernels.bench.machine import this_machine
from latentforge.kernels.bench.report import Report, Section
from latentforge.kernels.native import source_digest

Work = kd.Work | linear.Work | decode.Work
STREAM_BYTES, QUICK_STREAM_BYTES = 256 << 20, 8 << 20
ROUNDS, QUICK_ROUNDS = 5, 2
CHECKOUT = Path(__file__).resolve().parents[3]


def everything(*, quick: bool, compiled: bool) -> list[Work]:
    """What ``--all`` measures: every operator at its default sizes; ``quick`` has every section at a toy's size."""
    rows, vocab, hidden = (16, 4096, 64) if quick else (512, 151936, 1024)
    few = 32 if quick else 256
    return [
        kd.Work(rows, vocab, "bf16", dense=True, ce=(True, False), compiled=compiled),
        kd.Work(rows, vocab, "bf16", dense=False, ks=(64, 16, 128), compiled=compiled),
        kd.Work(rows, vocab, "bf16", dense=True, ks=(64,), directions=("reverse",), compiled=False),
        linear.Work(few, vocab, hidden, compiled=compiled),
        decode.Work((1, 4, 8, 16), vocab, hidden, ("bf16", "int8"), compiled=compiled),
    ]


def measure(
    works: Sequence[Work],
    *,
    threads: Sequence[int] = (),
    device: str | None = None,
    quick: bool = False,
    tell: Callable[[str], None] = lambda what: None,
) -> Report:
    """Measure each work on each number of threads (none given: torch's own)."""
    target = chosen_device(device)
    for work in works:
        check(work, target)
    before = torch.get_num_threads()
    counts = list(threads) or [before]
    for count in counts:
        if count < 1:
            raise RefusedError(f"threads = {count} is less than 1")
    keep_large_blocks()
    started = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    sections: list[Section] = []
    try:
        for count in counts:
            torch.set_num_threads(count)
            # What is compiled holds the number of threads that it was compiled for.
            torch._dynamo.reset()
            for work in works:
                room = {kd.Work: kd, linear.Work: linear, decode.Work: decode}[type(work)]
                found = room.measure(  # type: ignore[attr-defined]
                    work,
                    threads=count,
                    device=target,
                    stream_bytes=QUICK_STREAM_BYTES if quick else STREAM_BYTES,
                    rounds=QUICK_ROUNDS if quick else ROUNDS,
                    tell=lambda what, count=count: tell(f"{count} thread{'s' * (count > 1)}, {what}"),
                )
                sections += found
    finally:
        torch.set_num_threads(before)
    return Report(this_machine(target), sections, started, code_identity(), remarks(sections))


def chosen_device(name: str | None) -> torch.device:
    """``cpu`` or ``cuda``; by default the accelerator where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise RefusedError(f"device {name!r} is not one of cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise RefusedError("device 'cuda': torch sees none on this machine", next="use --device cpu")
    return torch.device(name)


def check(work: Work, device: torch.device) -> None:
    """Refuse sizes that make no sense, and those that do not fit into memory."""
    known = decode.WEIGHTS if isinstance(work, decode.Work) else tuple(kd.DTYPES)
    for dtype in work.weights if isinstance(work, decode.Work) else (work.dtype,):
        if dtype not in known:
            raise RefusedError(f"dtype {dtype!r} is not one of {', '.join(known)}")
    sizes: list[tuple[str, Any, int]] = [("vocab", work.vocab, 2)]
    rows = work.rows if isinstance(work.rows, tuple) else (work.rows,)
    sizes += [("rows", count, 1) for count in rows]
    ks = work.ks if isinstance(work, kd.Work) else (work.k,) if isinstance(work, linear.Work) else ()
    sizes += [("k", k, 1) for k in ks if k is not None]
    if not isinstance(work, kd.Work):
        sizes.append(("hidden", work.hidden, 1))
    for name, value, least in sizes:
        if value < least:
            raise RefusedError(f"{name} = {value} is less than {least}")
    for k in ks:
        if k is not None and k > work.vocab:
            raise RefusedError(f"k = {k} is more than the vocabulary's {work.vocab}")
    lowest = 0.0 if isinstance(work, decode.Work) else 1e-300
    if not lowest <= work.temperature < float("inf"):
        raise RefusedError(f"temperature = {work.temperature} is not a positive number")
    if isinstance(work, kd.Work):
        for direction in work.directions:
            if direction not in ("forward", "reverse"):
                raise RefusedError(f"direction {direction!r} is not one of forward, reverse")
    _refuse_too_large(work.needed_bytes + (1 << 30), device)


def _refuse_too_large(needed: int, device: torch.device) -> None:
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            return
    if needed > free:
        raise RefusedError(
            f"this work needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free", next="use fewer --rows"
        )


def code_identity(checkout: Path = CHECKOUT) -> str:
    """The commit of the checkout, with ``+`` where it has changes; else the digest of ``csrc``; else ``unknown``."""
    try:
        commit = subprocess.run(
            ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(checkout), "status", "--porcelain", "--", "csrc", "latentforge", "CMakeLists.txt"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        return f"git:{commit}{'+' if changed else ''}"
    except (OSError, subprocess.CalledProcessError):
        digest = source_digest(checkout)
        return f"csrc:{digest[:12]}" if digest else "unknown"


def remarks(sections: Sequence[Section]) -> list[str]:
    """What only several sections together show: top-k's cost over k, and int8 beside bf16."""
    found = []
    for threads in sorted({section.threads for section in sections}):
        mine = [section for section in sections if section.threads == threads]
        plural = f"{threads} thread{'s' if threads > 1 else ''}"
        by_kind: dict[str, dict[int, float]] = {}
        for section in mine:
            time = _ours(section)
            if section.op == "kd_loss" and "k" in section.shape and time is not None:
                by_kind.setdefault(section.title.rpartition(", ")[2], {})[section.shape["k"]] = time
        for kind, times in by_kind.items():
            if len(times) > 1:
                spread = max(times.values()) / min(times.values()) - 1
                shown = ", ".join(f"k={k} {time:.1f} ms" for k, time in sorted(times.items()))
                found.append(f"top-k over k, {kind}, {plural}: {shown}; they differ by {100 * spread:.1f} %")
        decoded = {(s.shape["N"], s.dtype): _ours(s) for s in mine if s.op == "latent_decode"}
        gains = []
        for (rows, dtype), time in decoded.items():
            eight = decoded.get((rows, "int8"))
            if dtype == "bf16" and time is not None and eight is not None:
                gains.append(f"{time / eight:.2f}x at {rows} row{'s' if rows > 1 else ''}")
        if gains:
            found.append(f"int8 weights beside bf16, {plural}: {', '.join(gains)}")
    return found


def _ours(section: Section) -> float | None:
    times = [line.median for line in section.lines if line.role == "ours" and line.median is not None]
    return min(times) if times else None
