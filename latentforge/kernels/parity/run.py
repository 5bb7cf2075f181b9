"""All comparisons of an operator and a backend, and their table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from latentforge.errors import RefusedError
from latentforge.kernels import backends
from latentforge.kernels.parity import where
from latentforge.kernels.parity.finding import Parity

SHOWN_FAILURES = 3
# What a backend may refuse in place of an answer: (op, backend) to the group of cases.
MAY_REFUSE = {("kd_loss", "cuda"): "jsd", ("kd_loss", "triton"): "jsd"}


@dataclass
class Group:
    """The comparisons of one kind, or why there were none; ``backend`` with its instruction set."""

    op: str
    backend: str
    name: str
    results: list[Parity] = field(default_factory=list)
    refused: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def worst(self) -> Parity | None:
        """The comparison nearest to, or furthest beyond, what is allowed; one that failed before any that passed."""
        # NaN is the worst of all, and no comparison with it is true.
        ranked = sorted(self.results, key=lambda r: (r.passed, -r.gradient_ratio if r.gradient_ratio >= 0 else -1e300))
        return ranked[0] if ranked else None

    @property
    def passed(self) -> bool:
        """Whether every case was compared, or rightly refused, and held."""
        if self.errors or not (self.results or self.refused):
            return False
        return all(result.passed for result in self.results)


@dataclass
class Comparison:
    """One run of ``latentforge kernels parity``; ``not_run`` says why a backend was left out."""

    groups: list[Group]
    not_run: list[tuple[str, str, str]]

    @property
    def passed(self) -> bool:
        """Whether something was compared and all of it held."""
        return bool(self.groups) and all(group.passed for group in self.groups)

    def as_json(self) -> dict[str, Any]:
        """Everything as data."""
        groups = []
        for group in self.groups:
            worst = group.worst
            groups.append(
                {
                    "op": group.op,
                    "backend": group.backend,
                    "group": group.name,
                    "passed": group.passed,
                    "cases": len(group.results),
                    "refused": group.refused,
                    "errors": group.errors,
                    "worst": None if worst is None else asdict(worst),
                    "failed": [asdict(result) for result in group.results if not result.passed],
                }
            )
        not_run = [dict(zip(("op", "backend", "because"), entry, strict=True)) for entry in self.not_run]
        return {"passed": self.passed, "groups": groups, "not_run": not_run}


def cases_of(op: str, *, quick: bool) -> Iterator[tuple[str, Any]]:
    """(group, case) of an operator."""
    if op == "kd_loss":
        from latentforge.kernels.parity.kd_grid import grid as kd

        return kd(quick=quick)
    if op == "linear_kd_loss":
        from latentforge.kernels.parity.linear import grid as linear

        return linear(quick=quick)
    from latentforge.kernels.parity.decode import grid as decode

    return decode(quick=quick)


def compare(op: str, case: Any, backend: str, isa: str | None) -> Parity:
    """One comparison of an operator."""
    if op == "kd_loss":
        from latentforge.kernels.parity import kd

        return kd.compare(case, backend, isa=isa)
    if op == "linear_kd_loss":
        from latentforge.kernels.parity import linear

        return linear.compare(case, backend)
    from latentforge.kernels.parity import decode

    return decode.compare(case, backend, isa=isa)


def check(
    ops: tuple[str, ...] = tuple(backends.OPS),
    names: tuple[str, ...] = where.BACKENDS,
    *,
    quick: bool = False,
    tell: Callable[[str], None] = lambda what: None,
) -> Comparison:
    """Compare each backend with fp64 on each operator that it has; ``tell`` hears what is being done."""
    for kind, values, known in (("op", ops, tuple(backends.OPS)), ("backend", names, where.BACKENDS)):
        for value in values:
            if value not in known:
                raise RefusedError(f"{kind} {value!r} is not one of {', '.join(known)}")
    groups: list[Group] = []
    not_run: list[tuple[str, str, str]] = []
    for op in ops:
        for backend in names:
            if backend not in backends.OPS[op]:
                continue
            because = where.why_not(op, backend)
            if because is not None:
                not_run.append((op, backend, because))
                continue
            for isa in where.variants(op, backend):
                groups += _groups(op, backend, isa, quick, tell)
    return Comparison(groups, not_run)


def _groups(op: str, backend: str, isa: str | None, quick: bool, tell: Callable[[str], None]) -> list[Group]:
    found: dict[str, Group] = {}
    shown = backend if isa is None else f"{backend} ({isa})"
    for name, case in cases_of(op, quick=quick):
        group = found.setdefault(name, Group(op, shown, name))
        tell(f"{op} {shown}: {name}")
        try:
            group.results.append(compare(op, case, backend, isa))
        except RefusedError as error:
            if MAY_REFUSE.get((op, backend)) == name and name in str(error):
                group.refused += 1
            else:
                group.errors.append(f"{case}: refused: {error}")
        except Exception as error:
            # A backend that raises has failed its comparison; the others are still worth knowing.
            group.errors.append(f"{case}: {type(error).__name__}: {error}")
    return list(found.values())


def render(found: Comparison) -> str:
    """The table: for each op, backend and group the worst error over what is allowed, and every failure by its case."""
    text: list[str] = []
    shown = None
    for group in found.groups:
        if (group.op, group.backend) != shown:
            shown = (group.op, group.backend)
            text += ["", f"{group.op}  {group.backend}"] if text else [f"{group.op}  {group.backend}"]
            text.append(
                f"  {'cases':<20}{'':>4}  {'verdict':<8}{'of allowed':>10}  {'error':>8}  {'torch':>8}  {'loss':>8}"
            )
        verdict = "ok" if group.passed else "FAIL"
        worst = group.worst
        if worst is None:
            said = "refused, as documented" if group.refused and not group.errors else ""
            text.append(f"  {group.name:<20}{group.refused:>4}  {verdict:<8}{said}".rstrip())
        else:
            gains = [result.gain for result in group.results if result.gain is not None]
            text.append(
                f"  {group.name:<20}{len(group.results):>4}  {verdict:<8}{worst.gradient_ratio:>10.2f}"
                f"  {worst.gradient_error:>8.1e}  {worst.torch_error:>8.1e}  {worst.loss_error:>8.1e}"
                + (f"  {min(gains):.0f}x nearer than rounded logits" if gains else "")
            )
        wrong = [_said(result) for result in group.results if not result.passed] + group.errors
        text += [f"      {one}" for one in wrong[:SHOWN_FAILURES]]
        text += (
            [f"      and {len(wrong) - SHOWN_FAILURES} more (--json has all)"] if len(wrong) > SHOWN_FAILURES else []
        )
    text += [""] if text and found.not_run else []
    text += [f"not run: {op} {backend}: {because}" for op, backend, because in found.not_run]
    count = sum(len(group.results) for group in found.groups)
    failed = sum(not group.passed for group in found.groups)
    text += ["", f"{count} comparisons with fp64: {'all held' if not failed else f'{failed} groups FAILED'}"]
    if not found.groups:
        text[-1] = "nothing was compared"
    return "\n".join(text)


def _said(result: Parity) -> str:
    """Which case failed, and by what."""
    reasons = [f"{result.gradient_ratio:.2f} of the error that is allowed"] if not result.gradient_ratio <= 1.0 else []
    if not result.loss_error <= max(result.torch_loss_error, result.loss_floor):
        reasons.append(f"loss off by {result.loss_error:.1e}, torch's by {result.torch_loss_error:.1e}")
    if result.disagreements:
        reasons.append(f"{result.disagreements} entries wrong in kind (NaN, infinite, written outside, no answer)")
    if result.gain is not None and not result.gain >= result.gain_floor:
        reasons.append(f"{result.gain:.1f}x nearer than rounded logits, {result.gain_floor:g}x are promised")
    return f"{result.case}: {'; '.join(reasons)}"
