"""The token-level student writes text in the engine of the latent one: with transformers' own answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from latentforge.errors import RefusedError
from latentforge.kernels.noise import gumbel
from latentforge.students.causal import ModelShape, new_model
from latentforge.students.latent.generate import Batch, Keys, Request, Sampling, generate
from latentforge.students.token_session import TokenModel

EOS, VOCABULARY = 0, 40


def causal(seed: int = 1, **words: Any) -> Any:
    """Weights are random, but spread so that texts differ: contexts, seeds and temperatures all matter."""
    found = new_model(ModelShape(2, 32, 4, 2, 48), vocab_size=VOCABULARY, positions=256, eos_id=EOS, seed=seed)
    with torch.no_grad():
        for weight in found.model.layers.parameters():
            if weight.dim() > 1:
                weight.mul_(10)
        found.lm_head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(5))
        found.lm_head.weight[EOS] *= 0.3
    return found


def model(*, cache: bool = True) -> TokenModel:
    return TokenModel(causal(), VOCABULARY, EOS, cache=cache)


def prompt(length: int, start: int = 1) -> tuple[int, ...]:
    return tuple(1 + (start * 7 + 3 * place) % (VOCABULARY - 1) for place in range(length))


def requests() -> list[Request]:
    return [
        Request(prompt(9), 21, seed=3),
        Request((), 18, seed=3, sampling=Sampling("head", 0.5)),
        Request(prompt(1, 4), 25, seed=4, sampling=Sampling("head", 0.0)),
        Request(prompt(6, 2), 5, seed=-1, sampling=Sampling("head", 0.5)),
    ]


def test_the_greedy_text_is_that_of_transformers() -> None:
    whole = causal()
    for one in ((), prompt(7), prompt(3, 5)):
        given = torch.tensor([[EOS, *one]])
        wanted = whole.generate(given, max_new_tokens=30, do_sample=False, use_cache=True, pad_token_id=EOS)
        (found,) = generate(model(), [Request(one, 30, sampling=Sampling("head", 0.0))])
        assert list(found.tokens) == wanted[0, given.shape[1] :].tolist()
    assert len(set(found.tokens)) > 3


def test_a_draw_is_of_the_softmax_at_its_temperature_by_the_noise_of_seed_and_position() -> None:
    one, many = model(), torch.arange(50)
    session = one.begin([torch.tensor(prompt(8)).unsqueeze(1)])
    drawn = session.draw(torch.zeros(50, dtype=torch.int64), Keys(many, many * 0 + 8), 0, 1, 0.5)[:, 0, 0]
    logits = causal()(torch.tensor([[EOS, *prompt(8)]])).logits[0, -1]
    assert torch.equal(drawn, (logits / 0.5 + gumbel(many[:, None], torch.tensor(8), torch.arange(40))).argmax(-1))
    assert len(drawn.unique()) > 3
    (found,) = generate(one, [Request(prompt(8), 1, seed=7, sampling=Sampling("head", 0.5))])
    assert found.tokens == (int(drawn[7]),)


def test_a_batch_of_unequal_prompts_is_each_by_itself() -> None:
    together = generate(model(), requests())
    assert together == [generate(model(), [one])[0] for one in requests()]
    assert len({token for one in together for token in one.tokens}) > 6


def test_a_cache_changes_nothing() -> None:
    assert generate(model(), requests()) == generate(model(cache=False), requests())


def test_a_step_with_a_cache_computes_one_position() -> None:
    rows: list[int] = []
    one = model()
    up = one.student.model.model.layers[0].mlp.up_proj
    up.register_forward_pre_hook(lambda _, given: rows.append(given[0].numel() // 32))
    generate(one, [Request(prompt(9), 4)])
    assert rows == [10, 1, 1, 1]


def test_another_architecture_writes_by_transformers_own_steps() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=EOS, **settings))
        for weight in llama.parameters():
            torch.nn.init.normal_(weight, std=0.6)
    one = TokenModel(llama, VOCABULARY, EOS)
    assert not one.steps
    greedy = [Request(prompt(n), 20, sampling=Sampling("head", 0.0)) for n in (3, 7)]
    for request, found in zip(greedy, generate(one, greedy), strict=True):
        given = torch.tensor([[EOS, *request.prompt]])
        wanted = llama.generate(given, max_new_tokens=20, do_sample=False, pad_token_id=EOS)
        assert list(found.tokens) == wanted[0, given.shape[1] :].tolist()
    assert len(set(found.tokens)) > 3


def test_draws_of_one_place_are_numbered_and_differ() -> None:
    session = model().begin([torch.tensor(prompt(8, n)).unsqueeze(1) for n in (1, 2)])
    keys = Keys(torch.tensor([7, 7]), torch.tensor([8, 8]))
    every = session.draw(torch.arange(2), keys, 0, 20, 1.0)
    assert every.shape == (2, 20, 1)
    later = session.draw(torch.tensor([1]), Keys(keys.seeds[:1], keys.positions[:1]), 5, 4, 1.0)
    assert torch.equal(later, every[1:, 5:9])
    assert len(every[0].unique()) > 3


def test_ids_of_padding_are_never_written() -> None:
    """A vocabulary of 40 padded to 48 rows, of which the last are the likeliest by far."""
    padded = new_model(ModelShape(1, 32, 2, 1, 48), vocab_size=48, positions=64, eos_id=EOS, seed=1)
    with torch.no_grad():
        padded.lm_head.weight[40:] *= 50
    one = TokenModel(padded, VOCABULARY, EOS)
    found = generate(one, [Request(prompt(4, n), 12, seed=n) for n in range(1, 9)])
    assert max(token for text in found for token in text.tokens) < VOCABULARY


def test_a_folder_writes_what_its_model_writes(tmp_path: Path) -> None:
    causal().save_pretrained(tmp_path / "student")
    assert generate(TokenModel.open(tmp_path / "student"), requests()) == generate(model(), requests())
    with pytest.raises(RefusedError, match="eos_id = 40 is no id below 40"):
        TokenModel.open(tmp_path / "student", vocab_size=40, eos_id=40)
    several = causal()
    several.config.eos_token_id = [0, 1]
    several.save_pretrained(tmp_path / "several")
    with pytest.raises(RefusedError, match=r"eos_token_id = \[0, 1\] does not say which"):
        TokenModel.open(tmp_path / "several")


@pytest.mark.parametrize("cache", [True, False])
def test_texts_that_join_and_leave_a_batch_are_those_by_themselves(cache: bool) -> None:
    asked = dict(enumerate(requests()))
    one = model(cache=cache)
    batch, found = Batch(one), {number: list[int]() for number in asked}
    order, steps = [1, 0, 2, 3], 0  # the longest prompt joins a shorter one, and shorter ones join it
    while order or len(batch):
        if order and steps % 3 == 0:
            batch.join({order[0]: asked[order.pop(0)]})
        for piece in batch.step():
            found[piece.request] += piece.tokens
        steps += 1
    for number, tokens in found.items():
        assert tokens == list(generate(one, [asked[number]])[0].tokens)


def test_a_batch_that_never_ends_holds_no_more_than_its_texts_do() -> None:
    batch = Batch(model())
    for number in range(20):
        batch.join({number: Request(prompt(4), 4)})
        batch.step()
        batch.step()
    assert batch._session._layers.get_seq_length() <= 1 + 4 + 4 + 1  # type: ignore


def windowed(kind: str) -> Any:
    """Layers that see the last 4 places alone, as Qwen3 says so of some of its layers and Mistral of all of them."""
    if kind == "qwen3":
        from transformers import Qwen3Config, Qwen3ForCausalLM

        made, config = Qwen3ForCausalLM, Qwen3Config(head_dim=8, use_sliding_window=True, max_window_layers=1, **SIZE)
        assert config.layer_types == ["full_attention", "sliding_attention"]
    else:
        from transformers import MistralConfig, MistralForCausalLM

        made, config = MistralForCausalLM, MistralConfig(**SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        found = made(config).eval()
        for weight in found.parameters():
            torch.nn.init.normal_(weight, std=0.5)
    return found


SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 4,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": None,
}


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
def test_texts_of_a_model_with_sliding_windows_join_and_leave_and_are_those_by_themselves(kind: str) -> None:
    whole = windowed(kind)
    one = TokenModel(whole, VOCABULARY, EOS)
    asked = {**dict(enumerate(requests())), 4: Request(prompt(300), 12, seed=9), 5: Request(prompt(300), 12, seed=8)}
    batch, found = Batch(one), {number: list[int]() for number in asked}
    order, steps = [1, 0, 4, 2, 5, 3], 0
    while order or len(batch):
        if order and steps % 3 == 0:
            batch.join({order[0]: asked[order.pop(0)]})
        for piece in batch.step():
            found[piece.request] += piece.tokens
        steps += 1
    alone = {number: list(generate(one, [request])[0].tokens) for number, request in asked.items()}
    assert found == alone
    assert [list(text.tokens) for text in generate(one, list(asked.values()))] == list(alone.values())
    assert alone[3] == list(generate(TokenModel(whole, VOCABULARY, EOS, cache=False), [asked[3]])[0].tokens)
    (greedy,) = generate(one, [Request(prompt(7), 20, sampling=Sampling("head", 0.0))])
    given = torch.tensor([[EOS, *prompt(7)]])
    wanted = whole.generate(given, max_new_tokens=20, do_sample=False, pad_token_id=EOS)
    assert list(greedy.tokens) == wanted[0, 8:].tolist()
    assert len(set(greedy.tokens)) > 2


def test_a_model_that_keeps_a_state_of_its_own_is_refused_before_it_writes() -> None:
    from transformers import Lfm2Config, Lfm2ForCausalLM, MambaConfig, MambaForCausalLM

    size = {name: value for name, value in SIZE.items() if name != "sliding_window"}
    mixed = Lfm2ForCausalLM(Lfm2Config(layer_types=["conv", "full_attention"], **size))
    with pytest.raises(RefusedError, match=r"Lfm2ForCausalLM keeps a state of its own of a text \(conv\)"):
        TokenModel(mixed, VOCABULARY, EOS)
    state = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(RefusedError, match=r"MambaForCausalLM keeps a state of its own"):
        TokenModel(state, VOCABULARY, EOS)
