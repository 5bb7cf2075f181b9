"""How fast ``linear_kd_loss`` is: loss, d_hidden and d_weight, beside its bare products and beside torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentforge.kernels import backends
from latentforge.kernels.bench import floor, formulas, peers
from latentforge.kernels.bench.contest import Action, Contest, Line
from latentforge.kernels.bench.kd import CE_WEIGHT, DTYPES, KD_WEIGHT, not_here
from latentforge.kernels.bench.machine import Streams
from latentforge.kernels.bench.report import Section
from latentforge.kernels.cpu.variants import variant
from latentforge.kernels.reference import kd as reference
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, LinearTargets, Targets, TopKTargets, topk_targets

CHECKED_ROWS = 6
# Rows at a time in which torch is given the work; the best counts.
CHUNKS = (64, 256)


@dataclass(frozen=True)
class Work:
    """What is measured: ``rows`` hidden states of ``hidden`` under [vocab, hidden].

    ``k`` None: the target is a teacher's layer of width ``teacher_hidden`` (the student's where None).
    """

    rows: int
    vocab: int
    hidden: int
    dtype: str = "bf16"
    k: int | None = 64
    teacher_hidden: int | None = None
    temperature: float = 2.0
    compiled: bool = True

    @property
    def needed_bytes(self) -> int:
        """Two weights, a gradient in fp32 and in the tensors' precision, and the logits of torch's lines."""
        element = DTYPES[self.dtype].itemsize
        weights = self.vocab * (self.hidden + (self.teacher_hidden or self.hidden))
        return weights * element * 3 + self.vocab * self.hidden * 4 + min(self.rows, max(CHUNKS)) * self.vocab * 24


def measure(
    work: Work,
    *,
    threads: int,
    device: torch.device,
    stream_bytes: int,
    rounds: int,
    tell: Callable[[str], None],
) -> list[Section]:
    """The section of one number of threads."""
    field_ = _Field(work, device)
    contest = Contest(device, rounds=rounds, tell=tell)
    streams = Streams(stream_bytes, threads, device)
    stream = Line("stream copy", "stream")
    contest.enter(stream, streams.action("copy"))
    element = DTYPES[work.dtype].itemsize
    width = None if work.k is not None else work.teacher_hidden or work.hidden
    counted = floor.linear_kd(work.rows, work.vocab, work.hidden, element, teacher_hidden=width)
    shape = {"N": work.rows, "V": work.vocab, "H": work.hidden}
    shape |= {"k": work.k} if work.k is not None else {"H_t": width or work.hidden}
    kind = "top-k" if work.k is not None else "a teacher's layer"
    found = Section(
        "linear_kd_loss",
        f"{kind}, forward KL and CE",
        shape,
        work.dtype,
        threads,
        work.temperature,
        counted,
        [],
        error_name="d_hidden error",
    )
    exact = field_.exact()

    def enter(line: Line, action: Action, *, turns: int | None = None, judged: bool = True) -> None:
        found.lines.append(line)
        if line.note is None:
            judge = (lambda: field_.error(exact)) if judged else None
            contest.enter(line, action, prepare=field_.forget, judge=judge, turns=turns)

    enter(Line(f"bare {work.dtype} products", "floor"), field_.products, judged=False)
    for backend in backends.OPS["linear_kd_loss"]:
        if backend == "reference":
            continue
        line = Line(f"cpu ({variant()})" if backend == "cpu" else backend, "ours")
        line.note = not_here("linear_kd_loss", backend, device)
        enter(line, lambda backend=backend: field_.ours(backend))
    chunks = sorted({min(chunk, work.rows) for chunk in CHUNKS})
    judge = {"prepare": field_.forget, "judge": lambda: field_.error(exact)}
    lines = [("torch eager", "eager", field_.formula)]
    if work.compiled:
        lines.insert(0, ("torch.compile", "compile", torch.compile(field_.formula, dynamic=False)))
    for name, role, formula in lines:
        found.lines.append(Line(name, role))
        contest.enter_best(found.lines[-1], {rows: field_.chunked(formula, rows) for rows in chunks}, **judge)
    teacher = (field_.targets.hidden, field_.targets.weight) if isinstance(field_.targets, LinearTargets) else None
    for peer in peers.over_hidden(field_.hidden, field_.weight, field_.labels, teacher, work.temperature):
        enter(peer.line, peer.action, judged=False)
    contest.run()
    found.streams = {"copy": streams.bytes("copy") / (stream.median or torch.nan) * 1e3}
    return [found]


class _Field:
    """The same hidden rows and weight for everybody; gradients are forgotten before each turn."""

    def __init__(self, work: Work, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(2)
        dtype = DTYPES[work.dtype]
        self.work = work

        def weights(width: int) -> Tensor:
            return torch.randn(work.vocab, width, generator=generator).mul_(4.0 / width**0.5).to(dtype)

        self.hidden = torch.randn(work.rows, work.hidden, generator=generator).to(dtype)
        self.weight = weights(work.hidden)
        self.labels = torch.randint(0, work.vocab, (work.rows,), generator=generator)
        width = work.teacher_hidden or work.hidden
        targets: Targets | LinearTargets
        if work.k is None:
            targets = LinearTargets(
                torch.randn(work.rows, width, generator=generator).to(dtype).to(device), weights(width).to(device)
            )
        else:
            pieces = []
            for rows in self.hidden.float().split(32):
                moved = rows + 0.5 * torch.randn(rows.shape, generator=generator)
                pieces.append(topk_targets((moved.to(dtype) @ self.weight.T).float(), work.k, work.temperature))
            joined = [torch.cat([getattr(p, name) for p in pieces]) for name in ("ids", "logprobs", "tail")]
            targets = TopKTargets(*(tensor.to(device) for tensor in joined))
        self.targets = targets
        self.hidden = self.hidden.to(device).requires_grad_()
        self.weight = self.weight.to(device).requires_grad_()
        self.labels = self.labels.to(device)
        self.scales = (CE_WEIGHT / work.rows, KD_WEIGHT * work.temperature**2 / work.rows)

    def forget(self) -> None:
        """No gradient is left from the turn before."""
        self.hidden.grad = self.weight.grad = None

    def ours(self, backend: str) -> None:
        """One call and its backward."""
        from latentforge.kernels.linear import linear_kd_loss

        linear_kd_loss(
            self.hidden,
            self.weight,
            self.targets,
            self.labels,
            temperature=self.work.temperature,
            ce_weight=CE_WEIGHT,
            kd_weight=KD_WEIGHT,
            denominator=float(self.work.rows),
            backend=backend,
        ).loss.backward()

    def products(self) -> None:
        """The products that cannot be saved, all rows at once, and nothing else."""
        with torch.no_grad():
            gradient = self.hidden @ self.weight.T
            if isinstance(self.targets, LinearTargets):
                gradient = self.targets.hidden @ self.targets.weight.T
            self.hidden.grad = gradient @ self.weight
            self.weight.grad = gradient.T @ self.hidden

    def formula(self, hidden: Tensor, *rest: Tensor) -> Tensor:
        """The differentiable loss of some rows as torch users write it."""
        said = (self.work.temperature, *self.scales)
        if self.work.k is None:
            return formulas.linear_dense(hidden, *rest, *said)
        return formulas.linear_topk(hidden, *rest, *said)

    def chunked(self, formula: Callable[..., Tensor], rows: int) -> Action:
        """Forward and backward in pieces of ``rows``; only whole ones: another shape would compile again."""
        starts = range(0, self.work.rows - rows + 1, rows)

        def action() -> None:
            for start in starts:
                part = slice(start, start + rows)
                if isinstance(self.targets, LinearTargets):
                    given = [self.targets.hidden[part], self.targets.weight]
                else:
                    assert isinstance(self.targets, TopKTargets)
                    given = [self.targets.ids[part], self.targets.logprobs[part], self.targets.tail[part]]
                formula(self.hidden[part], self.weight, *given, self.labels[part]).backward()

        return action

    def exact(self) -> Tensor:
        """d_hidden of the first CHECKED_ROWS rows in fp64, on the host."""
        rows = slice(0, CHECKED_ROWS)
        hidden, weight = self.hidden.detach()[rows].double().cpu(), self.weight.detach().cpu()
        logits = _product(hidden, weight)
        given: Targets
        if isinstance(self.targets, LinearTargets):
            given = DenseTargets(_product(self.targets.hidden[rows].double().cpu(), self.targets.weight.cpu()))
        else:
            assert isinstance(self.targets, TopKTargets)
            given = TopKTargets(*(t[rows].cpu() for t in (self.targets.ids, self.targets.logprobs, self.targets.tail)))
        temperature = self.work.temperature
        settings = KDSettings(temperature, temperature, ce_scale=self.scales[0], kd_scale=self.scales[1])
        found = reference.row_losses(logits, given, self.labels[rows].cpu(), settings, gradient=True)
        assert found.gradient is not None
        pieces = zip(found.gradient.split(8192, 1), weight.split(8192), strict=True)
        return sum((part @ some.double() for part, some in pieces), torch.zeros_like(hidden))

    def error(self, exact: Tensor) -> float:
        """Of d_hidden's first rows."""
        assert self.hidden.grad is not None
        return float((self.hidden.grad[: exact.shape[0]].double().cpu() - exact).norm() / exact.norm())


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T in fp64 without a copy of the weight in fp64."""
    return torch.cat([hidden @ part.double().T for part in weight.split(8192)], 1)
