"""Contexts beyond 16 k tokens: they run, a cache changes nothing in them, and nothing grows with their square."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentforge.students.latent.beginning import LONG
from latentforge.students.latent.generate import Request, Sampling, generate
from latentforge.students.latent.scoring import Scorer

from .conftest import VOCABULARY, untrained_model
from .test_tokens import token_level

LENGTH = 16_800


def prompt(length: int) -> tuple[int, ...]:
    return tuple(1 + (7 + 3 * place * place) % (VOCABULARY - 1) for place in range(length))


class Largest(TorchDispatchMode):
    """The most numbers that a tensor of the host had."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, torch.Tensor):
                self.seen = max(self.seen, one.untyped_storage().nbytes())
        return found


def model(which: str, *, cache: bool = True) -> Scorer:
    found: Scorer = untrained_model(4, cache=cache) if which == "K = 4" else token_level(1, 16, cache=cache)
    return found


@pytest.mark.parametrize("which", ["K = 4", "token level"])
def test_beyond_16_k_tokens_a_cache_changes_nothing_and_neither_does_a_short_neighbour(which: str) -> None:
    long = Request(prompt(LENGTH + 1), 9 if which == "K = 4" else 2, 1, Sampling("tokens", 0.9, top_p=0.95))
    with Largest() as largest:
        both = generate(model(which), [long, Request(prompt(9), 6, 2)])
    # The square, of bits, of the places of the long text would be 4 MB at K = 4 and 280 MB at K = 1.
    assert largest.seen < 40e6
    assert both[0] == generate(model(which, cache=False), [long])[0]
    assert both[1] == generate(model(which), [Request(prompt(9), 6, 2)])[0]


def test_a_text_of_16_k_tokens_is_scored_in_blocks() -> None:
    text = torch.tensor(prompt(LENGTH))
    with Largest() as largest:
        (found,) = model("K = 4").score([text])
    assert found.shape == (LENGTH,)
    assert bool(found.isfinite().all())
    assert largest.seen < 40e6
    tail = model("K = 4").score([text[:400]])[0]
    assert torch.allclose(found[:400], tail, atol=1e-4)


@pytest.mark.parametrize("which", ["K = 4", "token level"])
def test_long_short_and_equal_prompts_of_a_batch_stay_in_their_places(which: str) -> None:
    one = model(which)
    lengths = [one.chunk * LONG + 2, 3, one.chunk * LONG + 2, 0, one.chunk * (LONG + 40), 3, one.chunk * LONG + 2]
    requests = [Request(prompt(length), 9, seed) for seed, length in enumerate(lengths)]
    requests.append(Request((1, *prompt(2)), 9, 5))
    together = generate(one, requests)
    assert together == [generate(one, [request])[0] for request in requests]
    assert together[0].tokens != together[2].tokens
