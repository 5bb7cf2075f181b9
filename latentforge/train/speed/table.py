"""The breakdown of a step as a table for people."""

from __future__ import annotations

from latentforge.train.speed.measure import PARTS, Breakdown


def lines(found: Breakdown, machine: str) -> list[str]:
    """What was measured and on what, each part with its share, and what KD and the machine make of it."""
    tokens = found.sequences * (found.length - 1)
    micro = "" if found.micro_batch >= found.sequences else f" in parts of {found.micro_batch}"
    table = [
        f"{machine}, {found.device}, {found.threads} thread{'s' if found.threads > 1 else ''}, {found.precision}",
        f"student of {found.parameters / 1e6:.1f} M parameters, vocabulary {found.vocab_size}, "
        f"{found.sequences} x {found.length} tokens{micro}, k = {found.k}; the median of {found.steps} steps",
        "",
        f"{'part':<22}{'ms':>10}{'share':>9}",
    ]
    for name in PARTS:
        table.append(_row(name, found.parts[name], found.step))
        if name == "forward":
            table.append(_row("  of it the KD kernel", found.kernel, found.step))
    table.append(_row("step", found.step, found.step))
    table.append(_row("plain cross-entropy", found.plain, found.step))
    if found.eager is not None:
        table.append(_row("without torch.compile", found.eager, found.step))
    return [
        *table,
        "",
        f"{tokens / found.step:,.0f} predictions/s; targets took {1e3 * found.fetch:.1f} ms a step on their own thread "
        f"(prefetch {found.prefetch}), {found.hidden:.0%} of it hidden",
        f"KD over plain cross-entropy: {found.overhead:+.1%}",
        f"model FLOPs utilisation: {found.utilisation:.1%} ({found.flops / 1e9:.1f} GFLOP a step; a square matrix "
        f"product reaches {found.peak / 1e9:,.0f} GFLOP/s)",
    ]


def _row(name: str, seconds: float, whole: float) -> str:
    return f"{name:<22}{1e3 * seconds:>10.1f}{seconds / whole:>9.1%}"
