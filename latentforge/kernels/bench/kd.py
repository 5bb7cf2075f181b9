"""How fast the kernels are on this machine, beside torch and beside the memory's own speed, all in one run."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.cpu import kd as cpu
from latentforge.kernels.cpu.variants import variant as cpu_variant
from latentforge.kernels.native import native
from latentforge.kernels.reference import kd as reference
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets, topk_targets

CE_WEIGHT, KD_WEIGHT = 0.3, 0.7
ROUNDS = 3
CHECKED_ROWS = 6
# Rows at a time in which torch is given the work; the best counts.
EAGER_CHUNKS = (16,)
COMPILE_CHUNKS = (8, 64)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Line:
    """One backend's result; times in milliseconds, ``note`` says what was not possible."""

    backend: str
    milliseconds: list[float] = field(default_factory=list)
    gradient_error: float | None = None
    note: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.milliseconds) if self.milliseconds else None


@dataclass
class Section:
    """One kind of targets: the bytes that must move, and who moved them how fast."""

    targets: str
    floor_bytes: int
    floor: str
    lines: list[Line]


@dataclass
class Report:
    """All of one run of ``latentforge kernels bench kd``."""

    machine: str
    threads: int
    variant: str
    torch: str
    rows: int
    vocab: int
    dtype: str
    temperature: float
    bandwidth: float  # bytes a second, a += b
    sections: list[Section]

    def as_json(self) -> dict[str, Any]:
        found = asdict(self)
        for section, said in zip(self.sections, found["sections"], strict=True):
            for line, entry in zip(section.lines, said["lines"], strict=True):
                entry["median_ms"] = line.median
                if line.median:
                    entry["share_of_floor"] = section.floor_bytes / self.bandwidth / (line.median / 1e3)
        return found


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith(("model name", "Model")):
                    return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def bench_kd(
    *, rows: int, vocab: int, dtype: str, k: int | None, threads: int | None, temperature: float, compiled: bool = True
) -> Report:
    """Measure ``kd_loss`` with gradient: dense targets and, with ``k``, top-k targets.

    ``rows`` x ``vocab`` logits of ``dtype`` (bf16 or fp32) on each side. Contestants take turns, ROUNDS times each.
    """
    if dtype not in DTYPES:
        raise RefusedError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    for name, value, least in (("rows", rows, 1), ("vocab", vocab, 2), ("threads", threads, 1), ("k", k, 1)):
        if value is not None and value < least:
            raise RefusedError(f"{name} = {value} is less than {least}")
    if k is not None and k > vocab:
        raise RefusedError(f"k = {k} is more than the vocabulary's {vocab}")
    if not 0 < temperature < float("inf"):
        raise RefusedError(f"temperature = {temperature} is not a positive number")
    element = DTYPES[dtype].itemsize
    matrix = rows * vocab * element
    _refuse_too_large(matrix)
    variant = cpu_variant()
    _keep_large_blocks()
    before = torch.get_num_threads()
    threads = threads or before
    torch.set_num_threads(threads)
    try:
        bandwidth = measure_bandwidth(matrix, threads)
        student, teacher, labels = _logits(rows, vocab, DTYPES[dtype])
        contest = _Contest(student, labels, temperature, threads, variant, compiled)
        sections = [Section("dense", 3 * matrix, "3·N·V", contest.run(DenseTargets(teacher)))]
        if k is not None:
            pieces = [topk_targets(part, k, temperature) for part in teacher.split(32)]
            topk = TopKTargets(*(torch.cat([getattr(p, name) for p in pieces]) for name in ("ids", "logprobs", "tail")))
            del teacher
            sections.append(Section(f"top-k, k={k}", 2 * matrix + rows * k * 12, "2·N·V", contest.run(topk)))
    finally:
        torch.set_num_threads(before)
    return Report(cpu_name(), threads, variant, torch.__version__, rows, vocab, dtype, temperature, bandwidth, sections)


def measure_bandwidth(buffer_bytes: int, threads: int) -> float:
    """Bytes a second of a += b in fp32 (two reads, one write) over two buffers; the best of five."""
    count = max(buffer_bytes // 4, 1 << 16)
    a, b = torch.zeros(count), torch.ones(count)
    module = native()
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        module.stream_add(a.data_ptr(), b.data_ptr(), count, threads)
        seconds.append(time.perf_counter() - start)
    return 3 * 4 * count / min(seconds[1:])


def _refuse_too_large(matrix: int) -> None:
    # Master copy, working copy, teacher; torch's fp32 temporaries are bounded by the chunk.
    needed = 4 * matrix + (1 << 30)
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return
    if needed > available:
        raise RefusedError(
            f"the logits need {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free", next="use fewer --rows"
        )


def _keep_large_blocks() -> None:
    """Let malloc keep what torch frees: returning and faulting in its temporaries can cost it more than its work."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing goes back to the system
    except (OSError, AttributeError):
        pass


def _logits(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A teacher with a few likely tokens over a broad floor, a student near it, labels that the teacher likes."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.empty(rows, vocab, dtype=dtype), torch.empty(rows, vocab, dtype=dtype)
    labels = torch.empty(rows, dtype=torch.int64)
    for start in range(0, rows, 32):
        part = slice(start, min(start + 32, rows))
        count = part.stop - part.start
        t = torch.randn(count, vocab, generator=generator).mul_(2.2)
        peaks = torch.randint(0, vocab, (count, 64), generator=generator)
        t.scatter_(-1, peaks, torch.rand(count, 64, generator=generator) * 18)
        teacher[part] = t.to(dtype)
        student[part] = t.add_(torch.randn(count, vocab, generator=generator), alpha=0.7).to(dtype)
        labels[part] = peaks[:, 0]
    return student, teacher, labels


def dense_formula(s: Tensor, t: Tensor, y: Tensor, temperature: float, ce_scale: float, kd_scale: float) -> Tensor:
    """The definition for dense targets written for speed: no special cases, fp32 inside, gradient over ``s``."""
    sf = s.float()
    log_q = torch.log_softmax(sf / temperature, -1)
    log_p = torch.log_softmax(t.float() / temperature, -1)
    log_one = torch.log_softmax(sf, -1)
    p = log_p.exp()
    kd = (p * (log_p - log_q)).sum(-1)
    ce = -log_one.gather(-1, y[:, None]).squeeze(-1)
    gradient = (log_q.exp() - p) * (kd_scale / temperature) + log_one.exp() * ce_scale
    gradient.scatter_add_(-1, y[:, None], torch.full_like(ce[:, None], -ce_scale))
    s.copy_(gradient)
    return torch.stack([ce.sum(), kd.sum()])


def topk_formula(
    s: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    y: Tensor,
    temperature: float,
    ce_scale: float,
    kd_scale: float,
) -> Tensor:
    """The same for top-k targets with a tail."""
    sf = s.float()
    log_q = torch.log_softmax(sf / temperature, -1)
    log_one = torch.log_softmax(sf, -1)
    log_p = torch.log_softmax(torch.cat([logprobs / temperature, tail[:, None]], -1), -1)
    p, p_tail = log_p[:, :-1].exp(), log_p[:, -1:].exp()
    q = log_q.exp()
    log_q_top = log_q.gather(-1, ids)
    q_tail = (1 - log_q_top.exp().sum(-1, keepdim=True)).clamp_min(1e-30)
    kd = (p * (log_p[:, :-1] - log_q_top)).sum(-1) + (p_tail * (log_p[:, -1:] - q_tail.log())).squeeze(-1)
    ce = -log_one.gather(-1, y[:, None]).squeeze(-1)
    gradient = (q * (1 - p_tail / q_tail)).scatter(-1, ids, log_q_top.exp() - p) * (kd_scale / temperature)
    gradient = gradient + log_one.exp() * ce_scale
    gradient.scatter_add_(-1, y[:, None], torch.full_like(ce[:, None], -ce_scale))
    s.copy_(gradient)
    return torch.stack([ce.sum(), kd.sum()])


class _Contest:
    """The same logits for everybody, restored before each turn."""

    def __init__(
        self, student: Tensor, labels: Tensor, temperature: float, threads: int, variant: str, compiled: bool
    ) -> None:
        self.master = student
        self.work = torch.empty_like(student)
        self.labels = labels
        self.temperature = temperature
        self.threads = threads
        self.variant = variant
        self.compiled = compiled
        self.settings = KDSettings(
            temperature,
            temperature,
            ce_scale=CE_WEIGHT / student.shape[0],
            kd_scale=KD_WEIGHT * temperature**2 / student.shape[0],
        )

    def run(self, targets: Targets) -> list[Line]:
        exact = self._exact(targets)
        lines: list[Line] = []
        contestants: list[tuple[Line, Callable[[], Any]]] = []

        def enter(name: str, action: Callable[[], Any]) -> None:
            line = Line(name)
            lines.append(line)
            try:
                self._turn(action)
            except Exception as error:
                # torch.compile without a C++ compiler, or an internal error of it: said, not hidden.
                line.note = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"
                return
            line.gradient_error = self._error(exact)
            contestants.append((line, action))

        enter(f"cpu ({self.variant})", lambda: self._cpu(targets))
        formula = self._formula(targets)
        if self.compiled:
            self._enter_best(
                "torch.compile", COMPILE_CHUNKS, targets, enter, torch.compile(formula, dynamic=False), lines
            )
        self._enter_best("torch eager", EAGER_CHUNKS, targets, enter, formula, lines)
        enter("reference backend", lambda: self._reference(targets))
        keep = {id(line) for line in lines}
        for _ in range(ROUNDS):
            for line, action in contestants:
                # The readable definition is there for its numbers, not for its speed: one turn shows it.
                if id(line) in keep and not (line.backend == "reference backend" and line.milliseconds):
                    line.milliseconds.append(self._turn(action))
        return lines

    def _enter_best(
        self,
        name: str,
        chunks: tuple[int, ...],
        targets: Targets,
        enter: Callable[[str, Callable[[], Any]], None],
        formula: Callable[..., Any],
        lines: list[Line],
    ) -> None:
        """Try the chunks, keep the fastest."""
        tried: list[tuple[float, Line]] = []
        for chunk in sorted({min(chunk, self.master.shape[0]) for chunk in chunks}):
            action = self._chunked(formula, targets, chunk)
            enter(f"{name}, {chunk} rows", action)
            line = lines[-1]
            tried.append((float("inf") if line.note else self._turn(action), line))
        best = min(tried, key=lambda item: item[0])[1]
        for _, line in tried:
            if line is not best:
                lines.remove(line)

    def _turn(self, action: Callable[[], Any]) -> float:
        self.work.copy_(self.master)
        start = time.perf_counter()
        action()
        return (time.perf_counter() - start) * 1e3

    def _cpu(self, targets: Targets) -> None:
        cpu.row_losses(
            self.work,
            targets,
            self.labels,
            self.settings,
            write_gradient=True,
            threads=self.threads,
            isa=self.variant,
        )

    def _reference(self, targets: Targets) -> None:
        for rows, part in reference.chunks(self.work, targets):
            found = reference.row_losses(self.work[rows], part, self.labels[rows], self.settings, gradient=True)
            assert found.gradient is not None
            self.work[rows] = found.gradient.to(self.work.dtype)

    def _formula(self, targets: Targets) -> Callable[..., Tensor]:
        scales = (self.temperature, self.settings.ce_scale, self.settings.kd_scale)
        if isinstance(targets, DenseTargets):
            return lambda s, t, y: dense_formula(s, t, y, *scales)
        return lambda s, ids, logprobs, tail, y: topk_formula(s, ids, logprobs, tail, y, *scales)

    def _chunked(self, formula: Callable[..., Any], targets: Targets, chunk: int) -> Callable[[], None]:
        given = [targets.logits] if isinstance(targets, DenseTargets) else [targets.ids, targets.logprobs, targets.tail]
        # Only whole chunks: another shape would compile again.
        starts = range(0, self.master.shape[0] - chunk + 1, chunk)

        def action() -> None:
            for start in starts:
                rows = slice(start, start + chunk)
                formula(self.work[rows], *(tensor[rows] for tensor in given), self.labels[rows])

        return action

    def _exact(self, targets: Targets) -> Tensor:
        rows = slice(0, CHECKED_ROWS)
        part: Targets
        if isinstance(targets, DenseTargets):
            part = DenseTargets(targets.logits[rows].double())
        else:
            part = TopKTargets(targets.ids[rows], targets.logprobs[rows], targets.tail[rows])
        found = reference.row_losses(self.master[rows].double(), part, self.labels[rows], self.settings, gradient=True)
        assert found.gradient is not None
        return found.gradient

    def _error(self, exact: Tensor) -> float:
        return float((self.work[: exact.shape[0]].double() - exact).norm() / exact.norm())
