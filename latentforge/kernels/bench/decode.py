"""How fast ``latent_decode`` is: greedy tokens with log-probabilities, beside torch and beside reading the weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentforge.kernels import backends
from latentforge.kernels.bench import floor, formulas
from latentforge.kernels.bench.contest import Action, Contest, Line
from latentforge.kernels.bench.kd import DTYPES, not_here
from latentforge.kernels.bench.machine import Streams
from latentforge.kernels.bench.report import Section
from latentforge.kernels.cpu.decode import variant
from latentforge.kernels.decode import latent_decode
from latentforge.kernels.weights import Int8Weight, quantize_int8

WEIGHTS = (*DTYPES, "int8")
CHECKED_ROWS = 2


@dataclass(frozen=True)
class Work:
    """What is measured: each of ``rows`` under each of ``weights`` (bf16, fp32, int8) of [vocab, hidden].

    ``temperature`` 0 is greedy; above, a Gumbel-max draw, which torch's lines do by adding noise of its own.
    """

    rows: tuple[int, ...]
    vocab: int
    hidden: int
    weights: tuple[str, ...] = ("bf16",)
    temperature: float = 0.0
    compiled: bool = True

    @property
    def needed_bytes(self) -> int:
        """The weight in each form, and as fp64 in part."""
        each = {"bf16": 2, "fp32": 4, "int8": 3}
        return self.vocab * self.hidden * sum(each[kind] for kind in self.weights) + (1 << 28)


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
    generator = torch.Generator().manual_seed(1)
    contest = Contest(device, rounds=rounds, tell=tell)
    streams, stream_lines = Streams(stream_bytes, threads, device), {}
    for name in ("read",) if device.type == "cpu" else streams.names:
        stream_lines[name] = Line(f"stream {name}", "floor")
        contest.enter(stream_lines[name], streams.action(name))
    master = torch.randn(work.vocab, work.hidden, generator=generator).mul_(4.0 / work.hidden**0.5).bfloat16()
    hidden = torch.randn(max(work.rows), work.hidden, generator=generator)
    sections = []
    for kind in work.weights:
        weight: Tensor | Int8Weight = quantize_int8(master) if kind == "int8" else master.to(DTYPES[kind])
        if device.type != "cpu":
            weight = (
                Int8Weight(weight.values.to(device), weight.scales.to(device))
                if isinstance(weight, Int8Weight)
                else weight.to(device)
            )
        for rows in work.rows:
            h = hidden[:rows].to(device, torch.float32 if kind == "fp32" else torch.bfloat16)
            sections.append(_section(work, kind, h, weight, threads, contest))
    contest.run()
    speeds = {name: streams.bytes(name) / (line.median or torch.nan) * 1e3 for name, line in stream_lines.items()}
    for section in sections:
        section.streams = speeds
    return sections


def _section(
    work: Work, kind: str, hidden: Tensor, weight: Tensor | Int8Weight, threads: int, contest: Contest
) -> Section:
    rows, device = hidden.shape[0], hidden.device
    element = 1 if kind == "int8" else DTYPES[kind].itemsize
    found = Section(
        "latent_decode",
        "greedy" if work.temperature == 0 else "Gumbel-max",
        {"N": rows, "V": work.vocab, "H": work.hidden},
        kind,
        threads,
        work.temperature,
        floor.decode(rows, work.vocab, work.hidden, element),
        [],
        error_name="log-prob error",
    )
    exact = _exact_logprobs(hidden, weight, work.temperature or 1.0)
    answer: list[tuple[Tensor, Tensor]] = []

    def judge() -> float:
        ids, logprobs = answer[-1]
        wanted = exact.gather(1, ids[: exact.shape[0], None].cpu()).squeeze(1)
        return float((logprobs[: exact.shape[0]].double().cpu() - wanted).abs().max())

    def entered(line: Line, produce: Callable[[], tuple[Tensor, Tensor]], turns: int | None = None) -> None:
        found.lines.append(line)

        def action() -> None:
            answer[:] = [produce()]

        contest.enter(line, action, judge=judge, turns=turns)

    keys = {}
    if work.temperature != 0:
        keys = {"seeds": torch.arange(rows, device=device), "positions": torch.arange(rows, device=device) + 100}
    for backend in backends.OPS["latent_decode"]:
        line = Line(f"cpu ({variant()})" if backend == "cpu" else backend, "ours")
        if backend == "reference":
            line = Line("reference backend", "definition")
        else:
            line.note = not_here("latent_decode", backend, device)
        if line.note is not None:
            found.lines.append(line)
            continue
        entered(
            line,
            lambda backend=backend: tuple(
                latent_decode(hidden, weight, temperature=work.temperature, backend=backend, **keys)
            ),
            turns=1 if backend == "reference" else None,
        )
    # The definition comes first among the backends and last in the table.
    found.lines.sort(key=lambda line: line.role == "definition")
    eager = _formula(weight, work.temperature)
    if work.compiled:
        compiled: Action = torch.compile(eager, dynamic=False)
        entered(Line("torch.compile, matmul + max + log-sum-exp", "compile"), lambda: compiled(hidden))  # type: ignore[call-arg]
    entered(Line("torch eager, matmul + max + log-sum-exp", "eager"), lambda: eager(hidden))
    return found


def _formula(weight: Tensor | Int8Weight, temperature: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    if isinstance(weight, Int8Weight):
        values, scales = weight.values, weight.scales
        return lambda hidden: formulas.dequantised(hidden, values, scales, temperature)
    return lambda hidden: formulas.drawn(hidden, weight, temperature)


def _exact_logprobs(hidden: Tensor, weight: Tensor | Int8Weight, temperature: float) -> Tensor:
    """fp64 log-probabilities [CHECKED_ROWS, V] on the host."""
    checked = hidden[:CHECKED_ROWS].double().cpu()
    pieces = []
    matrix = weight.values if isinstance(weight, Int8Weight) else weight
    for start in range(0, matrix.shape[0], 8192):
        part = matrix[start : start + 8192].double().cpu()
        if isinstance(weight, Int8Weight):
            part = part * weight.scales[start : start + 8192, None].double().cpu()
        pieces.append(checked @ part.T)
    return torch.log_softmax(torch.cat(pieces, 1) / temperature, 1)
