"""``latentforge kernels parity`` fails on a kernel that is wrong, and says where."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from latentforge.cli import main
from latentforge.kernels.cpu import decode as cpu_decode
from latentforge.kernels.cpu import kd as cpu_kd
from latentforge.kernels.parity import decode, kd, linear, where
from latentforge.kernels.parity.finding import Parity, disagreements, distance
from latentforge.kernels.parity.kd_grid import VOCABULARIES, grid
from latentforge.verdicts import ExitCode

BF16, FP32 = torch.bfloat16, torch.float32
ROWS = kd.Case(1003, BF16, BF16, 2.0)
QUICK = ["kernels", "parity", "--quick", "--backend", "cpu"]


def test_the_definition_holds_on_every_case() -> None:
    # The readable backend is exact at its precision: what fails here is the comparison itself.
    assert [str(case) for _, case in grid(quick=True) if not kd.compare(case, "reference").passed] == []


def test_the_grid_has_what_the_design_asks_for() -> None:
    cases = [case for _, case in grid()]
    assert {case.vocab for case in cases} >= set(VOCABULARIES)
    assert {case.temperature for case in cases} >= {1.0, 2.0, 4.0}
    assert {case.direction for case in cases} == {"forward", "reverse", "jsd"}
    assert any(case.noise == 0.02 and case.ce == 0.0 for case in cases)
    assert {case.padded_side for case in cases if case.padding} == {"both", "student", "teacher"}
    assert {case.edge for case in cases} == {None, *kd.EDGES}
    assert any(case.rows == 0 for case in cases)
    assert any(case.k == case.vocab for case in cases)
    assert any(case.misaligned for case in cases)


def broken(change: Callable[[Tensor], None]) -> Callable[..., Any]:
    real = cpu_kd.row_losses

    def faulty(student: Tensor, *arguments: Any, **named: Any) -> Any:
        found = real(student, *arguments, **named)
        change(student)
        return found

    return faulty


FAULTS: dict[str, Callable[[Tensor], None]] = {
    "a gradient that is off by one per cent": lambda g: g.mul_(1.01),
    "one row that is not written": lambda g: g[2:3].zero_(),
    "a NaN in one entry": lambda g: g[2:3, 5:6].fill_(torch.nan),
    "NaN rows that are cleaned up": lambda g: g.nan_to_num_(),
    "ignored rows that get a gradient": lambda g: g[:1].add_(1e-3),
    "the last column left out": lambda g: g[:, -1:].zero_(),
    "a write past the end of a row": lambda g: (
        g.as_strided((1,), (1,), g.storage_offset() + g.shape[1]).fill_(0.0) if g.stride(0) > g.shape[1] else None
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_ends_with_1_and_names_its_cases(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(gradient: Tensor) -> None:
        if gradient.numel():
            FAULTS[fault](gradient)

    monkeypatch.setattr(cpu_kd, "row_losses", broken(change))
    monkeypatch.setattr(where, "variants", lambda op, backend: (None,))
    assert main([*QUICK, "--op", "kd_loss", "--json"]) == ExitCode.FAIL
    found = json.loads(capsys.readouterr().out)
    assert not found["passed"]
    assert any(group["failed"] for group in found["groups"])


def test_sound_kernels_end_with_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # With the test above: the verdict follows the kernel, not the command.
    monkeypatch.setattr(where, "variants", lambda op, backend: (None,))
    assert main([*QUICK]) == ExitCode.PASS
    shown = capsys.readouterr().out
    assert "FAIL" not in shown
    assert all(op in shown for op in ("kd_loss  cpu", "linear_kd_loss  cpu", "latent_decode  cpu"))
    assert "all held" in shown


def test_a_kernel_that_raises_has_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def raising(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("out of registers")

    monkeypatch.setattr(cpu_kd, "row_losses", raising)
    monkeypatch.setattr(where, "variants", lambda op, backend: (None,))
    assert main([*QUICK, "--op", "kd_loss"]) == ExitCode.FAIL
    shown = capsys.readouterr().out
    assert "RuntimeError: out of registers" in shown
    assert "more (--json has all)" in shown


def test_the_token_beside_the_right_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cpu_decode.decode

    def faulty(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        ids, logprobs = real(*arguments, **named)
        return torch.where(ids > 0, ids - 1, ids), logprobs

    case = decode.Case(5, 64, 503, BF16, 1.0)
    assert decode.compare(case).passed
    monkeypatch.setattr(cpu_decode, "decode", faulty)
    assert not decode.compare(case).passed


def test_a_token_that_the_cut_takes_away_is_seen() -> None:
    # Without the cut a draw at this temperature leaves the three likeliest in most of 40 rows.
    cut = decode.Case(40, 64, 503, BF16, 4.0, top_k=3)
    uncut = decode.Case(40, 64, 503, BF16, 4.0)
    loose, logprobs = cpu_decode.decode(*_arguments(uncut))
    assert decode.compare(cut).passed
    assert not decode.compare(cut, disturb=lambda ids, found: (loose, logprobs)).passed


def _arguments(case: decode.Case) -> tuple[Any, ...]:
    hidden, weight, bias, seeds, positions = case.tensors()
    return hidden, weight, case.settings, seeds, positions, bias


def test_logits_rounded_before_the_loss_are_seen_where_the_pair_is_close() -> None:
    close = linear.Case(64, 256, 777, BF16, 1.0, k=32, noise=0.01, ce=0.0)
    assert linear.compare(close, "reference").passed
    rounded = linear.compare(close, produce=lambda case: linear.by_definition(case, case.dtype))
    assert not rounded.passed
    assert rounded.gain == pytest.approx(1.0)


def test_a_weight_gradient_that_is_missing_is_seen() -> None:
    case = linear.Case(8, 32, 101, FP32, 2.0, k=5)

    def without_weight(case: linear.Case) -> linear.Gradients:
        found = linear.by_definition(case, FP32)
        return linear.Gradients(found.loss, found.hidden, None, found.bias)

    assert linear.compare(case, produce=lambda case: linear.by_definition(case, FP32)).passed
    assert not linear.compare(case, produce=without_weight).passed


def test_nan_is_worse_than_any_error() -> None:
    assert not Parity("case", float("nan"), 1e-3, float("nan")).passed
    assert disagreements(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])) == 1
    assert disagreements(torch.tensor([torch.inf]), torch.tensor([-torch.inf])) == 1
    assert distance(torch.zeros(3), torch.zeros(3)) == 0.0
    assert distance(torch.full((3,), 1e-3), torch.zeros(3)) > 0.0


@pytest.mark.parametrize(("option", "value"), [("--op", "kd_los"), ("--backend", "gpu")])
def test_what_is_not_there_is_refused_by_its_value(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "parity", option, value]) == ExitCode.REFUSED
    assert repr(value) in capsys.readouterr().err


def test_a_backend_that_cannot_run_here_is_said_and_is_no_pass(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert main(["kernels", "parity", "--backend", "cuda", "--op", "kd_loss"]) == ExitCode.FAIL
    assert "not run: kd_loss cuda: no CUDA device here" in capsys.readouterr().out
