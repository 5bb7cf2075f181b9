"""Training on a GPU starts with what the warm-up guard has proven there, or not at all."""

from __future__ import annotations

import pytest
import torch

from latentforge.errors import FailedError, RefusedError
from latentforge.kernels.guard import ladder
from latentforge.kernels.guard.ladder import Choice
from latentforge.train.setting import choose_kernel

GPU = torch.device("cuda", 0)


def test_the_cpu_needs_no_record() -> None:
    assert choose_kernel(torch.device("cpu"), torch.bfloat16) == ("cpu", None)


def test_a_gpu_gets_what_was_proven_and_a_fallback_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def fit(ops: list[str], dtype: torch.dtype, index: int) -> list[Choice]:
        asked.append((ops, dtype, index))
        return [found]

    monkeypatch.setattr(ladder, "require_fit", fit)
    found = Choice("kd_loss", "bf16", "cuda")
    assert choose_kernel(GPU, torch.bfloat16) == ("cuda", None)
    found = Choice("kd_loss", "bf16", "triton", (("cuda/kd_loss.bf16.dense.forward", "nan", ""),))
    backend, said = choose_kernel(GPU, torch.bfloat16)
    assert backend == "triton"
    assert said is not None
    assert "cuda/kd_loss.bf16.dense.forward" in said
    assert asked == [(["kd_loss"], torch.bfloat16, 0)] * 2


@pytest.mark.parametrize("error", [FailedError("this host is unfit"), RefusedError("there is no record")])
def test_an_unfit_or_unknown_gpu_stops_before_step_0(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*rest: object) -> None:
        raise error

    monkeypatch.setattr(ladder, "require_fit", refuse)
    with pytest.raises(type(error)):
        choose_kernel(GPU, torch.float32)
