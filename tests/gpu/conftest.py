"""Tests that need a CUDA device say so where there is none."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _cuda_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
