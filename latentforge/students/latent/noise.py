"""Where the latent student's randomness comes from: seeds of its rows alone, never the process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from latentforge.kernels.noise import philox_blocks, philox_words, unit_interval

_APART = 1 << 33
"""Beyond the ids of any vocabulary: a token drawn with the same seed and position shares no bit with a latent."""


def head_noise(seeds: Tensor, positions: Tensor, samples: int, size: int, *, first: int = 0) -> Tensor:
    """Noise of the energy head, fp32 [N, samples, size], uniform on [-1/2, 1/2], of int64 ``seeds`` and ``positions``
    [N]: a chunk's seed and its place in the text.

    The same bits on every device, in any batch; sample s is the same however many are drawn. ``first`` is the number
    of the first one, so that more can be drawn later.
    """
    if seeds.device.type == "cpu":
        begin, end = first * size, (first + samples) * size
        blocks = (_APART >> 2) + np.arange(begin >> 2, (end + 3) >> 2)
        words = philox_blocks(seeds.numpy(), positions.numpy(), blocks).reshape(len(seeds), -1)
        found = _unit_interval(words[:, begin & 3 :][:, : end - begin]) - np.float32(0.5)
        return torch.from_numpy(found).unflatten(1, (samples, size))
    number = torch.arange(first, first + samples, device=seeds.device).unsqueeze(-1)
    ids = _APART + number * size + torch.arange(size, device=seeds.device)
    return unit_interval(philox_words(seeds[:, None, None], positions[:, None, None], ids)) - 0.5


def _unit_interval(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32]:
    """``kernels.noise.unit_interval``, of the same bits."""
    high, low = (words >> 16).astype(np.float32), (words & 0xFFFF).astype(np.float32)
    return (high * np.float32(65536.0) + (low + np.float32(0.5))) * np.float32(2.0**-32)


class TrainingNoise:
    """The noise of training rows, a generator each: a row's draws do not depend on the batch around it.

    ``seeds`` int64 [B]. The bits are those of torch's generator on that device.
    """

    def __init__(self, seeds: Tensor, device: torch.device) -> None:
        self.device = device
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]

    def uniform(self, counts: Sequence[int], *shape: int) -> Tensor:
        """fp32 [sum of counts, *shape] on [-1/2, 1/2): ``counts`` [B] of each row, one row after the other."""
        return self._filled(counts, shape, lambda part, generator: part.uniform_(-0.5, 0.5, generator=generator))

    def normal(self, counts: Sequence[int], *shape: int) -> Tensor:
        """fp32 [sum of counts, *shape], standard normal."""
        return self._filled(counts, shape, lambda part, generator: part.normal_(generator=generator))

    def _filled(
        self, counts: Sequence[int], shape: tuple[int, ...], fill: Callable[[Tensor, torch.Generator], Tensor]
    ) -> Tensor:
        found = torch.empty(sum(counts), *shape, device=self.device)
        for part, generator in zip(found.split(list(counts)), self.generators, strict=True):
            fill(part, generator)
        return found
