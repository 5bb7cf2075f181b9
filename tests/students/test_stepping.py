"""A position more by a lean path: what the model's own forward pass computes, and nothing before it again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latentforge.students.causal import ModelShape, cast_weights, new_model
from latentforge.students.stepping import GrowingLayer, can_step, growing_cache, step

LENGTH = 24


def decoder(kv_heads: int = 2) -> Any:
    found = new_model(ModelShape(2, 32, 4, kv_heads, 48), vocab_size=40, positions=64, eos_id=0, seed=1).model.eval()
    with torch.no_grad():
        for weight in found.layers.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    return found


def vectors(rows: int = 3) -> Tensor:
    return torch.randn(rows, LENGTH, 32, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def stepped(
    model: Any, given: Tensor, begin: int, mask: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """States of the places from ``begin`` on, one step each, after one pass over those before."""
    cache, found = growing_cache(), []
    at = (lambda end: None) if mask is None else (lambda end: mask[:, :end])
    where = (lambda a, b: None) if positions is None else (lambda a, b: positions[:, a:b])
    if begin:
        model(
            inputs_embeds=given[:, :begin],
            attention_mask=at(begin),
            position_ids=where(0, begin),
            past_key_values=cache,
            use_cache=True,
        )
    for place in range(begin, LENGTH):
        found.append(step(model, given[:, place : place + 1], cache, at(place + 1), where(place, place + 1)))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("begin", [0, 9])
def test_steps_are_the_models_own_states(kv_heads: int, begin: int) -> None:
    model = decoder(kv_heads)
    with torch.no_grad():
        wanted = model(inputs_embeds=vectors(), use_cache=False).last_hidden_state[:, begin:]
    assert torch.allclose(stepped(model, vectors(), begin), wanted, atol=2e-5)
    assert wanted.std() > 0.3


def test_what_a_mask_hides_changes_no_state_by_a_bit() -> None:
    model, mask = decoder(), torch.ones(3, LENGTH, dtype=torch.bool)
    mask[0, :5], mask[2, :2] = False, False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    found = stepped(model, vectors(), 9, mask, positions)
    with torch.no_grad():
        wanted = model(inputs_embeds=vectors()[:1, 5:], use_cache=False).last_hidden_state[0, 4:]
    assert torch.allclose(found[0], wanted, atol=2e-5)
    other = vectors().masked_fill(~mask.unsqueeze(-1), 7.0)
    assert torch.equal(stepped(model, other, 9, mask, positions), found)
    assert not torch.allclose(stepped(model, vectors(), 9), found, atol=1e-2)


def test_bf16_weights_step_as_they_pass() -> None:
    model = decoder()
    cast_weights(model, torch.bfloat16)
    given = vectors().bfloat16()
    with torch.no_grad():
        wanted = model(inputs_embeds=given, use_cache=False).last_hidden_state[:, 9:]
    found = stepped(model, given, 9)
    assert found.dtype == torch.bfloat16
    assert float((found - wanted).float().norm() / wanted.float().norm()) < 0.02


@torch.no_grad()
def test_a_step_copies_nothing_of_the_positions_before_it_while_there_is_room() -> None:
    layer, places = GrowingLayer(), []
    added = torch.randn(200, 2, 3, 1, 4, generator=torch.Generator().manual_seed(1))
    for one in added:
        keys, _ = layer.update(one, one + 1)
        places.append(keys.data_ptr())
    assert len(set(places)) <= 7
    assert torch.equal(layer.keys, torch.cat(list(added), dim=2))
    assert torch.equal(layer.values, torch.cat(list(added + 1), dim=2))


def test_a_gradient_goes_through_what_a_layer_holds() -> None:
    layer, one = GrowingLayer(), torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    total = torch.zeros(())
    for part in one.split(1, dim=2):
        keys, values = layer.update(part, part)
        total = total + (keys * values).sum()
    total.backward()
    assert torch.equal(one.grad, 2 * one.detach() * torch.tensor([3.0, 2.0, 1.0])[:, None])


@torch.no_grad()
def test_a_cache_of_given_keys_holds_no_more_until_it_grows() -> None:
    one = torch.randn(4, 2, 9, 8)
    (layer,) = growing_cache([(one, one + 1)]).layers
    assert (layer.keys is one, layer.get_seq_length()) == (True, 9)
    keys, values = layer.update(one[:, :, :1], one[:, :, :1] + 1)
    assert torch.equal(keys, torch.cat([one, one[:, :, :1]], dim=2))
    assert torch.equal(values, keys + 1)
    assert keys.untyped_storage().nbytes() <= 3 * one.nbytes


@torch.no_grad()
def test_keys_that_were_set_to_others_are_the_ones_that_grow() -> None:
    layer, one = GrowingLayer(), torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    whole, _ = layer.update(one, one)
    before = whole.clone()
    layer.keys, layer.values = whole[1:, :, 2:], whole[1:, :, 2:]
    layer.update(one[1:, :, :1], one[1:, :, :1])
    assert torch.equal(layer.keys, torch.cat([before[1:, :, 2:], one[1:, :, :1]], dim=2))
    assert torch.equal(whole, before)  # what another still holds is as it was


def test_what_a_step_would_compute_otherwise_is_left_to_the_model() -> None:
    from transformers import Qwen3Config, Qwen3Model

    def of(**words: Any) -> bool:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return can_step(Qwen3Model(Qwen3Config(vocab_size=40, head_dim=8, num_key_value_heads=2, **shape, **words)))

    assert of()
    assert of(attention_bias=True)
    assert not of(hidden_act="gelu")
    assert not of(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    assert not of(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    assert not can_step(torch.nn.Linear(2, 2))
