"""The backbone: what a state has seen, what it has not, and that a cache changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.students.latent.backbone import DecoderShape, StateCache
from latentforge.students.latent.student import LatentShape, LatentStudent

VOCAB, CHUNK = 50, 4
SHAPE = LatentShape(VOCAB, CHUNK, 6, DecoderShape(2, 32, 4, 2, 48), head_blocks=1, noise=8)


def student(seed: int = 1) -> LatentStudent:
    return LatentStudent.new(SHAPE, seed=seed).eval()


def chunks(rows: int = 2, count: int = 9, seed: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (rows, count, CHUNK), generator=torch.Generator().manual_seed(seed))


def everything(text: Tensor) -> Tensor:
    return torch.ones_like(text, dtype=torch.bool)


def reach(model: LatentStudent) -> Tensor:
    """How much state j moves at most when any token of chunk i changes: [i, j]."""
    text = chunks()
    with torch.no_grad():
        before = model.states(text, everything(text))
        moved = []
        for i in range(text.shape[1]):
            changed = text.clone()
            changed[:, i, i % CHUNK] = (changed[:, i, i % CHUNK] + 1) % VOCAB
            moved.append((model.states(changed, everything(text)) - before).abs().amax((0, 2)))
    return torch.stack(moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_changes_nothing_before_it(dtype: torch.dtype) -> None:
    moved = reach(student().to(dtype))
    assert not moved.tril(-1).any()
    assert bool((moved.triu().diagonal() > 0).all())
    assert bool((moved[0] > 0).all())


def test_control_a_mask_that_lets_the_future_through_is_seen() -> None:
    model = student()
    for layer in model.backbone.decoder.model.layers:
        layer.self_attn.is_causal = False
    assert bool(reach(model).tril(-1).any())


def test_the_order_of_tokens_in_a_chunk_is_seen() -> None:
    text = chunks()
    turned = text.flip(-1)
    model = student()
    with torch.no_grad():
        assert not torch.allclose(model.states(text, everything(text)), model.states(turned, everything(text)))


@pytest.mark.parametrize("parts", [(1,) * 9, (4, 1, 4), (8, 1)])
def test_a_cache_changes_nothing(parts: tuple[int, ...]) -> None:
    model, text, cache = student(), chunks(), StateCache()
    with torch.no_grad():
        whole = model.states(text, everything(text))
        given = [model.states(part, everything(part), cache) for part in text.split(parts, dim=1)]
    assert len(cache) == 9
    assert torch.allclose(torch.cat(given, dim=1), whole, atol=2e-6)


def test_padding_inside_a_chunk_is_not_seen() -> None:
    text = chunks()
    valid = everything(text)
    valid[0, 3, 2:] = False
    other = text.masked_fill(~valid, 7)
    model = student()
    with torch.no_grad():
        first, second = model.states(text, valid), model.states(other, valid)
        unmasked = model.states(text, everything(text))
    assert torch.equal(first, second)
    assert not torch.allclose(first, unmasked)


@pytest.mark.parametrize("cached", [False, True])
def test_chunks_of_padding_before_a_text_are_not_seen(cached: bool) -> None:
    """A batch of texts of unequal lengths, the short ones padded in front: each as if it were alone."""
    model, text = student(), chunks(2, 6)
    padded, valid = text.clone(), everything(text)
    padded[1, :2] = 3
    valid[1, :2] = False
    with torch.no_grad():
        alone = model.states(text[1:, 2:], everything(text[1:, 2:]))
        if cached:
            cache = StateCache()
            parts = zip(padded.split((3, 1, 2), dim=1), valid.split((3, 1, 2), dim=1), strict=True)
            together = torch.cat([model.states(a, b, cache) for a, b in parts], dim=1)
        else:
            together = model.states(padded, valid)
        first = model.states(text[:1], everything(text[:1]))
    assert torch.allclose(together[1:, 2:], alone, atol=2e-6)
    assert torch.allclose(together[:1], first, atol=2e-6)
    assert bool(together.isfinite().all())


def test_chunks_of_padding_after_a_text_change_no_bit() -> None:
    model, text = student(), chunks()
    valid = everything(text)
    valid[:, 6:] = False
    with torch.no_grad():
        assert torch.equal(model.states(text, valid)[:, :6], model.states(text, everything(text))[:, :6])


def test_positions_keep_their_frequencies_in_bf16() -> None:
    """Rounded, the thousandth chunk would stand where the 998th does once the weights are fp32 again."""
    model = student()
    exact = model.backbone.decoder.model.rotary_emb.inv_freq.clone()
    assert not torch.equal(exact.bfloat16().float(), exact)
    cast = model.to(torch.bfloat16)
    assert torch.equal(cast.backbone.decoder.model.rotary_emb.inv_freq, exact)
    assert cast.table.weight.dtype == torch.bfloat16


def test_a_start_depends_on_its_seed_alone_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    first = student()
    assert torch.equal(torch.rand(3), wanted)
    torch.rand(11)
    pairs = list(zip(first.parameters(), student().parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.table.weight, student(seed=2).table.weight)


def test_states_beyond_four_thousand_chunks_can_be_had() -> None:
    model, text = student(), chunks(1, 4200)
    with torch.no_grad():
        assert bool(model.states(text, everything(text))[:, -1].isfinite().all())


def test_chunks_of_another_size_are_refused() -> None:
    text = chunks()[:, :, :3]
    with pytest.raises(RefusedError, match=r"chunks are \[2, 9, 3\] and valid \[2, 9, 3\], not \[B, C, 4\]"):
        student().states(text, everything(text))


@pytest.mark.parametrize(("width", "heads", "kv_heads"), [(30, 4, 2), (12, 4, 2), (32, 4, 3), (32, 0, 1), (32, 4, 0)])
def test_shapes_that_cannot_be_are_refused(width: int, heads: int, kv_heads: int) -> None:
    with pytest.raises(RefusedError, match=r"width = |heads = "):
        DecoderShape(1, width, heads, kv_heads, 8)
