"""The executable checks of the contract ``kd-mathematics`` that compare a fast path with fp64.

Each takes ``mutant``: the planted mistake with which it must fail. A mutant changes what is checked, never the check;
it is looked for in the first case of each group alone: what fails there fails on the whole grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from latentforge.contracts import Finding
    from latentforge.kernels.parity.finding import Parity
    from latentforge.kernels.parity.linear import Case, Gradients

_Case = TypeVar("_Case")


def kd_parity(*, groups: list[str] | None = None, mutant: str | None = None) -> Finding:
    """Every instruction set of the cpu backend is as near to fp64 as torch is at the same precision, in each group.

    ``groups`` names some of the grid's groups; None takes all.
    """
    from latentforge.kernels.fixtures import known_mutant
    from latentforge.kernels.parity import where
    from latentforge.kernels.parity.kd import compare
    from latentforge.kernels.parity.kd_grid import grid

    known_mutant(mutant, ("perturbed", "nan_hidden"))
    disturb = {"perturbed": _off_by_a_per_cent, "nan_hidden": _without_nan}.get(mutant or "")
    best, *others = where.variants("kd_loss", "cpu")
    cases = [(name, case) for name, case in grid(quick=True) if groups is None or name in groups]
    if mutant:
        return _finding([compare(case, isa=best, disturb=disturb) for case in _first_of_each(cases)], "gradient")
    results = [compare(case, isa=best) for _, case in cases]
    # The others share all but their vectors: one case of each group tells them apart.
    results += [compare(case, isa=isa) for isa in others for case in dict(cases).values()]
    return _finding(results, "gradient")


def linear_parity(*, mutant: str | None = None) -> Finding:
    """linear_kd_loss is no further from fp64 than torch, and where the pair is close ten times nearer."""
    from latentforge.kernels.fixtures import known_mutant
    from latentforge.kernels.parity import linear

    known_mutant(mutant, ("rounded_logits",))
    produce = _rounded_first if mutant else None
    grid = list(linear.grid(quick=True))
    cases = _first_of_each(grid) if mutant else [case for _, case in grid]
    results = [linear.compare(case, produce=produce) for case in cases]
    found = _finding(results, "gradient")
    gains = [result.gain for result in results if result.gain is not None]
    return type(found)(
        found.passed,
        f"{found.text}; close pairs at least {min(gains):.0f} times nearer than logits rounded to bf16 (10 promised)",
        found.measured | {"least_gain": min(gains)},
    )


def decode_parity(*, mutant: str | None = None) -> Finding:
    """latent_decode takes the token that fp64 takes, or one as good to 1e-4, with its log-probability to 1e-4."""
    from latentforge.kernels.fixtures import known_mutant
    from latentforge.kernels.parity import decode

    known_mutant(mutant, ("next_token", "unnormalised"))
    disturb = {"next_token": _next_token, "unnormalised": _unnormalised}.get(mutant or "")
    grid = list(decode.grid(quick=True))
    cases = _first_of_each(grid) if mutant else [case for _, case in grid]
    results = [decode.compare(case, disturb=disturb) for case in cases]
    return _finding(results, "log-probability or score")


def _first_of_each(cases: list[tuple[str, _Case]]) -> list[_Case]:
    """The first case of each group."""
    return list(dict(reversed(cases)).values())


def _finding(results: list[Parity], what: str) -> Finding:
    from latentforge.contracts import Finding

    worst = max(results, key=lambda r: r.gradient_ratio)
    loss = max(results, key=lambda r: r.loss_excess)
    odd = sum(result.disagreements for result in results)
    failed = [result for result in results if not result.passed]
    return Finding(
        not failed,
        f"{len(results)} cases, {len(failed)} fail: {what} error at most {worst.gradient_ratio:.2f} of what is allowed "
        f"({worst.gradient_error:.1e}, {worst.case}); {odd} entries wrong in kind; loss off by {loss.loss_error:.1e}",
        {
            "cases": len(results),
            "failed": [result.case for result in failed[:10]],
            "worst_ratio": worst.gradient_ratio,
            "worst_error": worst.gradient_error,
            "worst_case": worst.case,
            "worst_loss_error": loss.loss_error,
            "disagreements": odd,
        },
    )


def _off_by_a_per_cent(gradient: Tensor) -> Tensor:
    return gradient * 1.01


def _without_nan(gradient: Tensor) -> Tensor:
    return gradient.nan_to_num()


def _next_token(ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    return (ids + (ids >= 0)).clamp_max(31), logprobs


def _unnormalised(ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    return ids, logprobs + 1e-3


def _rounded_first(case: Case) -> Gradients:
    from latentforge.kernels.parity import linear

    return linear.by_definition(case, case.dtype)
