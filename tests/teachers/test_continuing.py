"""What a teacher goes on with after each chunk: its own distribution of the next K tokens, however it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentforge.data import ShardSet
from latentforge.errors import FailedError, RefusedError
from latentforge.kernels.noise import gumbel
from latentforge.memory import KnownModel
from latentforge.memory.continuing import continuations_memory
from latentforge.memory.estimate import Answering
from latentforge.spec.latent import ContinuationsSpec
from latentforge.targets.continuations import ContinuationStore
from latentforge.targets.continued import Ids, contexts
from latentforge.teachers import hf_continuing
from latentforge.teachers.continuing import Contexts, Continuing
from latentforge.teachers.continuing_agreement import check_draws
from latentforge.teachers.continuing_store import continue_all, continued_rows, coverage, sampled
from latentforge.teachers.fixture import FixtureTeacher
from latentforge.teachers.hf import HFTeacher
from latentforge.teachers.protocol import Tokens

EOS = 0
ASKED = Continuing(chunk=3, count=4, temperatures=(1.0, 0.5), eos_id=EOS, seed=7)


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> HFTeacher:
    return HFTeacher.open(teacher_folder)


def rows_of(vocabulary: int = 270, *, chunks: int = 5) -> np.ndarray:
    """Four rows of text, among them one with padding in its middle and one that is padding but for its first token."""
    rows = np.random.Generator(np.random.PCG64(3)).integers(1, vocabulary, (4, chunks * ASKED.chunk))
    rows[1, 4:6] = EOS
    rows[2, 8:] = EOS
    rows[3, 1:] = EOS
    return rows


def by_itself(teacher: HFTeacher, tokens: Tokens, asked: Continuing) -> dict[float, Ids]:
    """The definition: each draw a text of its own, computed whole for every token, without padding."""
    found = {t: np.full((len(tokens) // asked.chunk - 1, asked.count, asked.chunk), -1) for t in asked.temperatures}
    for temperature, ids in found.items():
        key = torch.tensor(asked.key(tokens, temperature))
        for context in range(len(ids)):
            before = tokens[: (context + 1) * asked.chunk].reshape(-1, asked.chunk)
            if EOS in before[-1]:
                continue
            kept = [chunk[: chunk.tolist().index(EOS) + 1] if EOS in chunk else chunk for chunk in before]
            texts = torch.from_numpy(np.concatenate(kept)).expand(asked.count, -1)
            for place in range(asked.chunk):
                whole = torch.cat([texts, torch.ones_like(texts[:, :1])], dim=1)
                logits = teacher.logits(whole).view(*texts.shape, -1)[:, -1, : teacher.vocab_size]
                positions = torch.arange(asked.count)[:, None] * 2**32 + context * asked.chunk + place
                noise = gumbel(key, positions, torch.arange(teacher.vocab_size))
                texts = torch.cat([texts, (logits / temperature + noise).argmax(-1, keepdim=True)], dim=1)
            ids[context] = texts[:, -asked.chunk :].numpy()
    return found


def all_of(teacher: Any, rows: np.ndarray, asked: Continuing = ASKED) -> list[dict[float, Ids]]:
    found = dict(teacher.continuations(list(rows), asked))
    return [found[number] for number in range(len(rows))]


def same(left: dict[float, Ids], right: dict[float, Ids]) -> bool:
    return list(left) == list(right) and all(np.array_equal(left[t], right[t]) for t in left)


def other_model(kind: str) -> Any:
    """A tiny model of another architecture, of 270 tokens and 6 padding rows."""
    import transformers

    torch.manual_seed(2)
    common: dict[str, Any] = {"vocab_size": 276, "eos_token_id": 0, "bos_token_id": None}
    decoder = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
    }
    if kind == "gpt2":
        config = transformers.GPT2Config(
            **common, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4
        )
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "gemma2":
        config = transformers.Gemma2Config(**common, **decoder, final_logit_softcapping=3.0, query_pre_attn_scalar=16)
        return transformers.Gemma2ForCausalLM(config).eval()
    if kind == "granite":
        del decoder["head_dim"]
        config = transformers.GraniteConfig(**common, **decoder, logits_scaling=4.0)
        return transformers.GraniteForCausalLM(config).eval()
    config = transformers.MistralConfig(**common, **decoder, sliding_window=4 if kind == "sliding" else None)
    return transformers.MistralForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gpt2", "gemma2", "granite"])
def test_all_draws_at_once_are_those_of_each_text_by_itself(teacher: HFTeacher, kind: str) -> None:
    one, rows = teacher, rows_of()
    if kind != "qwen3":
        one, rows = HFTeacher(other_model(kind), teacher.folder, teacher.tokenizer, "float32"), rows[1:2]
    for tokens, found in zip(rows, all_of(one, rows), strict=True):
        assert same(found, by_itself(one, tokens, ASKED))
        assert all(ids.dtype == np.int32 for ids in found.values())


def test_draws_depend_on_the_row_alone_and_more_of_them_begin_as_fewer_do(teacher: HFTeacher) -> None:
    rows = rows_of()
    together = all_of(teacher, rows)
    assert all(same(found, all_of(teacher, rows[n : n + 1])[0]) for n, found in enumerate(together))
    assert all(same(*pair) for pair in zip(all_of(teacher, rows[::-1]), together[::-1], strict=True))
    fewer = Continuing(ASKED.chunk, 2, (0.5,), EOS, ASKED.seed)
    for found, all_found in zip(all_of(teacher, rows, fewer), together, strict=True):
        assert np.array_equal(found[0.5], all_found[0.5][:, :2])
    other = all_of(teacher, rows, Continuing(ASKED.chunk, ASKED.count, ASKED.temperatures, EOS, seed=8))
    assert not same(other[0], together[0])
    assert not np.array_equal(together[0][1.0], together[0][0.5]), "temperatures have noise of their own"


def test_padding_is_not_seen(teacher: HFTeacher) -> None:
    """The same text, whose first document ends at another place of its chunk: the same contexts, up to the noise."""
    rows = rows_of()[:1].repeat(2, axis=0)
    rows[0, 1:3] = EOS
    rows[1, 1], rows[1, 2] = EOS, 99  # what stands behind an EOS in its chunk is padding, whatever it is
    contexts = [Contexts.of(row, ASKED) for row in rows]
    assert contexts[0].text.tolist() == contexts[1].text.tolist() == [rows[0, 0], EOS, *rows[0, 3:12]]
    assert contexts[0].ends.tolist() == [5, 8, 11]
    assert (all_of(teacher, rows[:1])[0][1.0][0] == -1).all(), "nothing goes on after the end of a document"


def test_the_cache_is_as_large_as_the_plan_of_the_run_says(
    teacher: HFTeacher, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    compute = hf_continuing._Decoder.states

    def measured(self: Any, ids: Any, cache: Any, *others: Any) -> Any:
        found = compute(self, ids, cache, *others)
        sizes.append(sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers))
        return found

    monkeypatch.setattr(hf_continuing._Decoder, "states", measured)
    all_of(teacher, whole_rows(1))
    answering = Answering(KnownModel.of_folder(teacher_folder), "process", "fp32", "cpu")
    spec = ContinuationsSpec(count=ASKED.count, temperatures=ASKED.temperatures, batch_size=1)
    plan = continuations_memory(answering, spec, chunk=ASKED.chunk, length=6 * ASKED.chunk)
    (planned,) = (term.bytes for term in plan.terms if term.name == "kv")
    # A layer's old cache is there while it grows, in the plan: half as much again, of two layers.
    assert 1.4 * max(sizes) < planned < 1.8 * max(sizes)
    together = spec.model_copy(update={"batch_size": 3})
    more = continuations_memory(answering, together, chunk=ASKED.chunk, length=6 * ASKED.chunk)
    assert next(term.bytes for term in more.terms if term.name == "kv") == 3 * planned


def test_rows_longer_than_the_model_has_positions_are_refused(teacher: HFTeacher) -> None:
    tokens = np.ones(3 * 23, np.int64)
    with pytest.raises(RefusedError, match="64 positions"):
        all_of(teacher, tokens[None])


def chi_square(counts: np.ndarray, shares: np.ndarray) -> float:
    """Standard deviations of the chi-square statistic above its mean, outcomes expected less than 5 times as one."""
    expected = shares * counts.sum()
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    there = expected > 0
    statistic = float(((counts - expected)[there] ** 2 / expected[there]).sum())
    freedom = int(there.sum()) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("kind", ["hf", "fixture"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_is_drawn_has_the_teachers_joint_distribution(teacher: HFTeacher, kind: str, temperature: float) -> None:
    one: Any = teacher if kind == "hf" else FixtureTeacher(270)
    vocabulary, tokens = one.vocab_size, np.array([[17, 5, 44, 101]])
    asked = Continuing(chunk=2, count=3000, temperatures=(temperature,), eos_id=EOS, seed=1)
    drawn = all_of(one, tokens, asked)[0][temperature][0].astype(np.int64)

    def shares(texts: torch.Tensor) -> torch.Tensor:
        """Of the token after each text [N, n]."""
        asked_of = torch.cat([texts, torch.ones_like(texts[:, :1])], dim=1)
        logits = one.logits(asked_of).view(len(texts), texts.shape[1], -1)[:, -1, :vocabulary]
        return torch.softmax(logits.double() / temperature, dim=-1)

    context = torch.from_numpy(tokens[:, :2])
    every = torch.cat([context.expand(vocabulary, -1), torch.arange(vocabulary)[:, None]], dim=1)
    first, second = shares(context), shares(every)
    joint = (first[0, :, None] * second).numpy()
    counts = np.zeros((vocabulary, vocabulary))
    np.add.at(counts, tuple(drawn.T), 1)
    assert chi_square(counts.ravel(), joint.ravel()) < 5
    # The control: each token from its own row along the text, as rows of a scored document would give it.
    along = shares(torch.from_numpy(tokens[:, :3]))
    generator = np.random.Generator(np.random.PCG64(0))
    apart = [generator.choice(vocabulary, len(drawn), p=p[0].numpy() / p[0].numpy().sum()) for p in (first, along)]
    counts = np.zeros((vocabulary, vocabulary))
    np.add.at(counts, tuple(np.stack(apart)), 1)
    assert chi_square(counts.ravel(), joint.ravel()) > 25


def pairs(rows: np.ndarray, drawn: list[dict[float, Ids]]) -> Iterator[tuple[Tokens, dict[float, Ids]]]:
    return zip(rows, drawn, strict=True)


def whole_rows(n: int = 3) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(4)).integers(1, 270, (n, 6 * ASKED.chunk))


class Served:
    """The same teacher as something that answers from elsewhere: it draws and scores, and gives no logits."""

    def __init__(self, teacher: HFTeacher) -> None:
        self.capabilities, self.limits, self.vocab_size = frozenset({"score"}), teacher.limits, teacher.vocab_size
        self.score, self.continuations = teacher.score, teacher.continuations


@pytest.mark.parametrize("kind", ["here", "served"])
@pytest.mark.parametrize("fault", ["none", "shifted", "late", "apart", "greedy", "repeated"])
def test_draws_that_are_not_the_teachers_own_are_found(teacher: HFTeacher, kind: str, fault: str) -> None:
    one: Any = teacher if kind == "here" else Served(teacher)
    asked, cold = (Continuing(3, 8, temperatures, EOS, 7) for temperatures in ((1.0, 0.5), (1e-4,)))
    rows = whole_rows(6)
    drawn = all_of(one, rows, asked)
    for tokens, found in zip(rows, drawn, strict=True):
        for ids in found.values():
            if fault == "shifted":  # by a chunk
                ids[:] = np.roll(ids, 1, axis=0)
            elif fault == "late":  # by a token: the first is the text's own last one
                ids[:, :, 1:] = ids[:, :, :-1]
                ids[:, :, 0] = tokens.reshape(-1, 3)[:-1, -1:]
            elif fault == "apart":  # each place is another draw's: right one by one, and not together
                for place in range(3):
                    ids[:, :, place] = np.roll(ids[:, :, place], place, axis=1)
            elif fault == "greedy":
                ids[:] = all_of(one, tokens[None], cold)[0][1e-4]
            elif fault == "repeated":
                ids[:] = ids[:, :1]
    if fault != "none":
        with pytest.raises(FailedError, match="asked another way"):
            check_draws(one, pairs(rows, drawn), asked)
        return
    found = check_draws(one, pairs(rows, drawn), asked)
    assert found.unit == ("nats" if kind == "here" else "deviations")
    assert found.tokens > 30


def test_a_model_of_bf16_draws_as_its_whole_texts_say_but_for_rounding(teacher_folder: Path) -> None:
    one = HFTeacher.open(teacher_folder, dtype="bfloat16")
    rows = whole_rows()
    assert check_draws(one, pairs(rows, all_of(one, rows)), ASKED).worst < 0.5


class Stopping:
    """A teacher that is gone after so many rows."""

    def __init__(self, teacher: Any, rows: int) -> None:
        self.teacher, self.left = teacher, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def continuations(self, sequences: Any, asked: Continuing) -> Iterator[tuple[int, dict[float, Ids]]]:
        for found in self.teacher.continuations(sequences, asked):
            if not self.left:
                raise ConnectionError
            self.left -= 1
            yield found


def create(path: Path, teacher: Any, asked: Continuing) -> ContinuationStore:
    return ContinuationStore.create(
        path,
        teacher.identity.as_json(),
        chunk=asked.chunk,
        count=asked.count,
        temperatures=asked.temperatures,
        vocab_size=teacher.vocab_size,
        eos_id=asked.eos_id,
        seed=asked.seed,
    )


def test_rows_are_kept_as_they_are_drawn_and_the_rest_is_drawn_later_alike(shards: ShardSet, tmp_path: Path) -> None:
    one, asked = FixtureTeacher(270), Continuing(4, 3, (1.0,), shards.eos_id, 7)
    wanted = [tokens for block in continued_rows(shards, 30) for tokens in block]
    assert len(wanted) == 30 + len(shards.heldout)
    with create(tmp_path / "whole.sqlite", one, asked) as whole:
        assert continue_all(one, shards, whole, asked, rows=30, batch_size=5) == len({w.tobytes() for w in wanted})
        told: list[tuple[int, int]] = []
        with create(tmp_path / "parts.sqlite", one, asked) as parts:
            with pytest.raises(ConnectionError):
                continue_all(
                    Stopping(one, 7), shards, parts, asked, rows=30, batch_size=4, progress=lambda *n: told.append(n)
                )
            assert parts.stats()["rows"] == 7
            assert told[0] == (0, 36)
            assert told[-1] == (7, 36)
            new = continue_all(one, shards, parts, asked, rows=30, batch_size=16)
            assert new == whole.stats()["rows"] - 7
            assert coverage(parts, shards, 30).fraction == 1.0
            assert all(same(parts.get(tokens), whole.get(tokens)) for tokens in wanted)
            assert len(list(sampled(parts, shards, 30, sample=5))) == 5
            assert continue_all(Stopping(one, 0), shards, parts, asked, rows=30, batch_size=16) == 0, "nothing is asked"


def test_a_model_whose_cache_forgets_is_found_at_its_first_row_and_nothing_is_stored(
    teacher: HFTeacher, shards: ShardSet, tmp_path: Path
) -> None:
    sliding = HFTeacher(other_model("sliding"), teacher.folder, teacher.tokenizer, "float32")
    asked = Continuing(4, 3, (1.0,), shards.eos_id, 7)
    with create(tmp_path / "c.sqlite", sliding, asked) as store:
        with pytest.raises(FailedError, match="asked another way"):
            continue_all(sliding, shards, store, asked, batch_size=4)
        assert store.stats()["rows"] == 0


def test_more_rows_than_there_are_is_refused(shards: ShardSet) -> None:
    with pytest.raises(RefusedError, match=r"continuations\.rows = 41: there are 40 training rows"):
        list(continued_rows(shards, 41))


@settings(max_examples=60)
@given(data=st.data())
def test_a_context_is_the_text_up_to_its_chunk_whatever_the_padding(data: st.DataObject) -> None:
    chunk, chunks = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    tokens = np.array(data.draw(st.lists(st.integers(0, 3), min_size=chunk * chunks, max_size=chunk * chunks)))
    asked = Continuing(chunk, 2, (1.0, 0.5), EOS, 7)
    row = Contexts.of(tokens, asked)
    text: list[int] = []
    wanted = []
    for number, one in enumerate(tokens.reshape(chunks, chunk).tolist()):
        text += one[: one.index(EOS) + 1] if EOS in one else one
        if EOS not in one and number < chunks - 1:
            wanted.append((number, list(text)))
    assert [(n, row.text[:end].tolist()) for n, end in zip(row.chunks, row.ends, strict=True)] == wanted
    ids = np.arange(2 * len(wanted) * chunk).reshape(2, len(wanted), chunk)
    spread = row.spread(dict.fromkeys(asked.temperatures, ids), tokens, asked)[0.5]
    assert spread.shape == (chunks - 1, 2, chunk)
    for place, (number, _) in enumerate(wanted):
        assert np.array_equal(spread[number], ids[:, place])
    assert (spread[~contexts(tokens, chunk, EOS)] == -1).all()


@pytest.mark.parametrize("shape", [(1, 12), (12, 1), (4, 2)])
def test_chunks_of_one_token_and_rows_of_one_chunk_are_no_special_case(
    teacher: HFTeacher, tmp_path: Path, shape: tuple[int, int]
) -> None:
    chunk, chunks = shape
    asked = Continuing(chunk, 3, (1.0,), EOS, 7)
    tokens = np.random.Generator(np.random.PCG64(1)).integers(1, 270, chunk * chunks)
    for one in (teacher, FixtureTeacher(270)):
        (found,) = all_of(one, tokens[None], asked)
        assert found[1.0].shape == (chunks - 1, 3, chunk)
        with create(tmp_path / f"{one.identity.model}.sqlite", one, asked) as store:
            assert store.put(tokens, found)
            kept = store.of(torch.from_numpy(tokens[None]), 1.0)
        assert kept.ids.shape == (1, chunks - 1, 3, chunk)
        assert bool(kept.given.all())
        assert check_draws(one, [(tokens, found)], asked) is not None
    assert same(all_of(teacher, tokens[None], asked)[0], by_itself(teacher, tokens, asked))
