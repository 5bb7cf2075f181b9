"""What a launch depends on beside its arguments: the current device, the direction, the architecture's name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from latentforge.errors import RefusedError
from latentforge.kernels import backends
from latentforge.kernels.decode_settings import DecodeSettings
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, topk_targets
from latentforge.kernels.triton import ahead, decode, kd, on_device_of


class Launches:
    """In the place of the kernels: where each was launched."""

    def __init__(self) -> None:
        self.inside = False
        self.seen: list[bool] = []

    @contextmanager
    def device(self, tensor: torch.Tensor) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def __getattr__(self, name: str) -> Any:
        return self

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **named: self.seen.append(self.inside)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    found = Launches()
    for module in (kd, decode):
        monkeypatch.setattr(module, "on_device_of", found.device)
        monkeypatch.setattr(module, "require", lambda name: found)
    return found


def test_every_launch_of_the_loss_is_on_the_tensors_device(launches: Launches) -> None:
    logits = torch.randn(3, 64)
    for targets in (DenseTargets(logits), topk_targets(logits, 4, 2.0), None):
        for write in (False, True):
            kd.row_losses(logits.clone(), targets, None, KDSettings(2.0, 2.0), write_gradient=write)
    assert launches.seen == [True] * 6


def test_every_launch_of_the_decoder_is_on_the_tensors_device(launches: Launches) -> None:
    hidden, weight, keys = torch.randn(3, 16), torch.randn(64, 16), torch.arange(3)
    decode.decode(hidden, weight, DecodeSettings(64), None, None, None)
    decode.decode(hidden, weight, DecodeSettings(64, 1.0, 5, 0.9), keys, keys, None)
    assert launches.seen == [True] * 4


def test_a_tensor_of_a_gpu_makes_its_device_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: ("on", device))
    on_second: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    assert on_device_of(on_second) == ("on", torch.device("cuda", 1))
    with on_device_of(torch.zeros(1)):
        pass


@pytest.mark.parametrize("arch", [89, 90, 121])
def test_code_of_its_own_architecture_is_fit_and_of_another_is_not(arch: int) -> None:
    own = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    report = ahead.CompiledReport("a kernel", arch, (own,), 80, 0, 32, "ptxas", "13", 1.0)
    assert ahead.problems(report) == []
    assert ahead.unfit(replace(report, targets=("sm_80",)))
    assert ahead.unfit(replace(report, shared_bytes=1 << 20))
    # Spills are shown as a problem of the build; whether they cost too much is timed.
    assert ahead.problems(replace(report, spill_bytes=16))
    assert ahead.unfit(replace(report, spill_bytes=16)) == []


@pytest.mark.parametrize(
    ("op", "backend"),
    [(op, name) for op in ("kd_loss", "linear_kd_loss") for name in ("auto", *backends.OPS[op][2:])],
)
def test_jsd_on_a_gpu_is_refused_before_anything_runs_and_says_what_to_pass(op: str, backend: str) -> None:
    there: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    with pytest.raises(RefusedError, match="'jsd'") as error:
        backends.choose(op, there, backend=backend, direction="jsd")
    assert "reference" in str(error.value.next)
    assert backends.choose(op, there, backend="reference", direction="jsd") == "reference"
