"""How fast ``kd_loss`` is: loss and gradient over the logits, beside torch and beside the memory's own speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentforge.kernels import backends
from latentforge.kernels.bench import floor, formulas, peers
from latentforge.kernels.bench.contest import Action, Contest, Line
from latentforge.kernels.bench.machine import Streams
from latentforge.kernels.bench.report import Section
from latentforge.kernels.cpu.variants import variant
from latentforge.kernels.parity import where
from latentforge.kernels.reference import kd as reference
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets, topk_targets

CE_WEIGHT, KD_WEIGHT = 0.3, 0.7
CHECKED_ROWS = 6
# Rows at a time in which torch is given the work; the best counts.
EAGER_CHUNKS = (4, 16)
COMPILE_CHUNKS = (8, 64)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Work:
    """What is measured: sizes, precision, and for each of ``directions`` with CE (``ce``), without it, or both.

    ``ks`` are the top-k targets besides the dense ones (``dense``); torch stands beside the first of them.
    """

    rows: int
    vocab: int
    dtype: str
    ks: tuple[int, ...] = ()
    dense: bool = True
    directions: tuple[str, ...] = ("forward",)
    ce: tuple[bool, ...] = (True,)
    temperature: float = 2.0
    compiled: bool = True

    @property
    def matrix_bytes(self) -> int:
        """Of one [N, V]."""
        return self.rows * self.vocab * DTYPES[self.dtype].itemsize

    @property
    def needed_bytes(self) -> int:
        """Master copy, working copy, teacher and its topmost entries; torch's temporaries are bounded by the chunk."""
        return 4 * self.matrix_bytes


def measure(
    work: Work,
    *,
    threads: int,
    device: torch.device,
    stream_bytes: int,
    rounds: int,
    tell: Callable[[str], None],
) -> list[Section]:
    """The sections of one number of threads; all contestants of all of them take turns."""
    student, teacher, labels = logits(work.rows, work.vocab, DTYPES[work.dtype])
    inputs: list[tuple[str, Targets, int | None]] = [("dense", DenseTargets(teacher), None)] if work.dense else []
    for k in work.ks:
        pieces = [topk_targets(part, k, work.temperature) for part in teacher.split(32)]
        inputs.append((f"top-k, k={k}", TopKTargets(*(_joined(pieces, n) for n in ("ids", "logprobs", "tail"))), k))
    contest = Contest(device, rounds=rounds, tell=tell)
    streams, stream_lines = Streams(stream_bytes, threads, device), {}
    for name in streams.names:
        stream_lines[name] = Line(f"stream {name}", "floor")
        contest.enter(stream_lines[name], streams.action(name))
    field_ = _Field(work, student.to(device), labels.to(device), contest)
    sections = []
    for direction in work.directions:
        for ce in work.ce:
            for title, targets, k in inputs:
                beside_torch = k is None or k == work.ks[0]
                sections.append(field_.section(title, _moved(targets, device), k, direction, ce, threads, beside_torch))
    contest.run()
    speeds = {name: streams.bytes(name) / (line.median or torch.nan) * 1e3 for name, line in stream_lines.items()}
    for section in sections:
        section.streams = speeds
    return sections


def logits(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
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


class _Field:
    """The same student logits for everybody, restored before each turn."""

    def __init__(self, work: Work, student: Tensor, labels: Tensor, contest: Contest) -> None:
        self.work = work
        self.master = student
        self.logits = torch.empty_like(student)
        self.labels = labels
        self.contest = contest

    def section(
        self, title: str, targets: Targets, k: int | None, direction: str, ce: bool, threads: int, beside_torch: bool
    ) -> Section:
        work = self.work
        element = DTYPES[work.dtype].itemsize
        counted = (floor.dense_kd if k is None else floor.topk_kd)(work.rows, work.vocab, element, ce=ce)
        settings = KDSettings(
            work.temperature,
            work.temperature,
            ce_scale=CE_WEIGHT / work.rows if ce else 0.0,
            kd_scale=KD_WEIGHT * work.temperature**2 / work.rows,
            direction=direction,
        )
        exact = self._exact(targets, settings)
        rounded = exact.to(self.master.dtype).double()
        found = Section(
            "kd_loss",
            f"{title}, {direction} KL" + (" and CE" if ce else " alone"),
            {"N": work.rows, "V": work.vocab, **({} if k is None else {"k": k})},
            work.dtype,
            threads,
            work.temperature,
            counted,
            [],
            rounding_error=float((rounded - exact).norm() / exact.norm()),
        )

        def enter(line: Line, action: Action, turns: int | None = None) -> None:
            found.lines.append(line)
            self.contest.enter(line, action, prepare=self._restore, judge=lambda: self._error(exact), turns=turns)

        def enter_best(line: Line, formula: Callable[..., Tensor], chunks: Sequence[int]) -> None:
            found.lines.append(line)
            actions = {
                chunk: self._chunked(formula, targets, chunk)
                for chunk in sorted({min(chunk, work.rows) for chunk in chunks})
            }
            self.contest.enter_best(line, actions, prepare=self._restore, judge=lambda: self._error(exact))

        for backend in backends.OPS["kd_loss"]:
            if backend == "reference":
                continue
            line = Line(f"cpu ({variant()})" if backend == "cpu" else backend, "ours")
            line.note = not_here("kd_loss", backend, self.master.device)
            if line.note is not None:
                found.lines.append(line)
                continue
            kernel = where.room("kd_loss", backend).row_losses
            enter(line, lambda kernel=kernel: kernel(self.logits, targets, self.labels, settings, write_gradient=True))
        if beside_torch:
            formula = self._formula(targets, settings)
            if work.compiled:
                compiled = torch.compile(formula, dynamic=False)
                enter_best(Line("torch.compile", "compile"), compiled, COMPILE_CHUNKS)
            enter_best(Line("torch eager", "eager"), formula, EAGER_CHUNKS)
            # The readable definition is there for its numbers, not for its speed: one turn shows it.
            enter(Line("reference backend", "definition"), lambda: self._reference(targets, settings), turns=1)
            if isinstance(targets, DenseTargets) and not ce:
                for peer in peers.over_logits(self.logits, targets.logits, work.temperature, direction):
                    found.lines.append(peer.line)
                    if peer.line.note is None:
                        self.contest.enter(peer.line, peer.action, prepare=self._restore)
        return found

    def _restore(self) -> None:
        self.logits.copy_(self.master)

    def _reference(self, targets: Targets, settings: KDSettings) -> None:
        for rows, part in reference.chunks(self.logits, targets):
            found = reference.row_losses(self.logits[rows], part, self.labels[rows], settings, gradient=True)
            assert found.gradient is not None
            self.logits[rows] = found.gradient.to(self.logits.dtype)

    def _formula(self, targets: Targets, settings: KDSettings) -> Callable[..., Tensor]:
        said = (settings.temperature, settings.ce_scale, settings.kd_scale, settings.direction)
        if isinstance(targets, DenseTargets):
            return lambda s, t, y: formulas.dense(s, t, y, *said)
        return lambda s, ids, logprobs, tail, y: formulas.topk(s, ids, logprobs, tail, y, *said)

    def _chunked(self, formula: Callable[..., Tensor], targets: Targets, chunk: int) -> Action:
        given = [targets.logits] if isinstance(targets, DenseTargets) else [targets.ids, targets.logprobs, targets.tail]
        # Only whole chunks: another shape would compile again. What is left over is torch's gain.
        starts = range(0, self.master.shape[0] - chunk + 1, chunk)

        def action() -> None:
            for start in starts:
                rows = slice(start, start + chunk)
                formula(self.logits[rows], *(tensor[rows] for tensor in given), self.labels[rows])

        return action

    def _exact(self, targets: Targets, settings: KDSettings) -> Tensor:
        rows = slice(0, CHECKED_ROWS)
        part: Targets
        if isinstance(targets, DenseTargets):
            part = DenseTargets(targets.logits[rows].double())
        else:
            part = TopKTargets(targets.ids[rows], targets.logprobs[rows], targets.tail[rows])
        found = reference.row_losses(self.master[rows].double(), part, self.labels[rows], settings, gradient=True)
        assert found.gradient is not None
        return found.gradient

    def _error(self, exact: Tensor) -> float:
        return float((self.logits[: exact.shape[0]].double() - exact).norm() / exact.norm())


def not_here(op: str, backend: str, device: torch.device) -> str | None:
    """Why a backend is not timed on tensors of ``device``; None where it is."""
    if backend in ("cuda", "triton") and not torch.cuda.is_available():
        # Triton's interpreter would run here: for numbers, not for speed.
        return "no CUDA device here"
    if (backend == "cpu") != (device.type == "cpu"):
        return f"the tensors are on {device.type}"
    return where.why_not(op, backend)


def _moved(targets: Targets, device: torch.device) -> Targets:
    if isinstance(targets, DenseTargets):
        return DenseTargets(targets.logits.to(device))
    return TopKTargets(targets.ids.to(device), targets.logprobs.to(device), targets.tail.to(device))


def _joined(pieces: list[TopKTargets], name: str) -> Tensor:
    return torch.cat([getattr(piece, name) for piece in pieces])
