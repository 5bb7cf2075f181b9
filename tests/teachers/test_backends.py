"""Teachers answer for the position that was asked, at the temperature that was asked, or refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentforge.data import ShardSet
from latentforge.errors import RefusedError
from latentforge.kernels.targets import DenseTargets, TopKTargets
from latentforge.targets import TargetStore
from latentforge.targets.levels import TAIL_STEP
from latentforge.targets.row import GRADED
from latentforge.targets.topk import sequence_rows
from latentforge.teachers.fixture import FixtureTeacher
from latentforge.teachers.hf import HFTeacher
from latentforge.teachers.protocol import Limits, Teacher, TeacherIdentity
from latentforge.teachers.store import StoreTeacher

TEMPERATURES = (1.0, 2.0)


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> HFTeacher:
    return HFTeacher.open(teacher_folder)


@pytest.fixture
def tokens(shards: ShardSet) -> torch.Tensor:
    return torch.from_numpy(shards.train.rows([3, 1, 4]))


@pytest.fixture
def store_path(teacher: HFTeacher, tokens: torch.Tensor, tmp_path: Path) -> Path:
    path = tmp_path / "targets.sqlite"
    with TargetStore.create(path, teacher.identity.as_json(), 8, TEMPERATURES, vocab_size=270) as store:
        rows = sequence_rows(*teacher.topk(tokens, k=8, temperatures=TEMPERATURES), sequences=3)
        store.put_many(zip(tokens.numpy(), rows, strict=True))
    return path


def dense(teacher: Teacher, tokens: torch.Tensor) -> torch.Tensor:
    targets = teacher.targets(tokens, temperature=1.0)
    assert isinstance(targets, DenseTargets)
    return targets.logits


def top(teacher: Teacher, tokens: torch.Tensor, temperature: float, k: int | None) -> TopKTargets:
    targets = teacher.targets(tokens, temperature=temperature, k=k)
    assert isinstance(targets, TopKTargets)
    return targets


def test_every_backend_is_a_teacher(teacher: HFTeacher, store_path: Path) -> None:
    with StoreTeacher.open(store_path) as stored:
        backends: list[Teacher] = [teacher, stored, FixtureTeacher(270)]
        here = ["logits", "sample", "score"]
        assert [sorted(one.capabilities) for one in backends] == [here, ["score"], here]
        assert all(one.vocab_size == 270 for one in backends)
        assert stored.identity == teacher.identity


@pytest.mark.parametrize("k", [8, 3])
def test_every_backend_scores_document_by_document_what_it_gives_as_a_batch(
    teacher: HFTeacher, store_path: Path, tokens: torch.Tensor, k: int
) -> None:
    with StoreTeacher.open(store_path) as stored:
        for backend in (teacher, stored, FixtureTeacher(270)):
            scored = dict(backend.score(list(tokens.numpy()), k=k, temperatures=TEMPERATURES))
            assert sorted(scored) == [0, 1, 2]
            for temperature in TEMPERATURES:
                batch = top(backend, tokens, temperature, k)
                ids = np.concatenate([scored[number].ids for number in range(3)])
                tails = np.concatenate([scored[number].tails[temperature] for number in range(3)])
                assert np.array_equal(ids, batch.ids.numpy())
                assert np.allclose(tails, batch.tail.numpy(), atol=1e-5)


def test_documents_of_different_lengths_are_scored_each_by_its_own_tokens(
    teacher: HFTeacher, tokens: torch.Tensor
) -> None:
    documents = [tokens[0].numpy(), tokens[1, :9].numpy(), tokens[2, :9].numpy(), tokens[0, :2].numpy()]
    for number, targets in teacher.score(documents, k=4, temperatures=(1.0,)):
        alone = top(teacher, torch.from_numpy(documents[number]).unsqueeze(0), 1.0, 4)
        assert np.array_equal(targets.ids, alone.ids.numpy())
        assert np.allclose(targets.logprobs, alone.logprobs.numpy(), atol=1e-5)


def test_limits_refuse_what_a_teacher_cannot_answer() -> None:
    limits = Limits(20, 16, (1.0,))
    limits.check(k=20, tokens=16, temperatures=(1.0,))
    for asked, said in (
        ({"k": 21}, "k = 21: this teacher answers at most 20"),
        ({"k": 0}, "k = 0"),
        ({"tokens": 17}, "sequence_length = 17 is longer than the teacher's 16"),
        ({"temperatures": (1.0, 2.0)}, "temperature 2: this teacher gives tails for T = 1 only"),
        ({"temperatures": (float("nan"),)}, "temperature nan"),
    ):
        with pytest.raises(RefusedError, match=said):
            limits.check(**{"k": 20, "tokens": 16, "temperatures": (1.0,), **asked})  # type: ignore[arg-type]


def test_the_fixture_repeats_the_last_token_at_every_position(tokens: torch.Tensor) -> None:
    fixture = FixtureTeacher(270)
    last = tokens[:, :-1].reshape(-1)
    assert torch.equal(dense(fixture, tokens).argmax(-1), last)
    assert torch.equal(top(fixture, tokens, 2.0, 3).ids[:, 0].long(), last)
    assert torch.equal(dense(fixture, tokens), dense(FixtureTeacher(270), tokens))


def test_logits_of_a_position_see_nothing_behind_it(teacher: HFTeacher, tokens: torch.Tensor) -> None:
    whole = dense(teacher, tokens).reshape(3, 15, -1)
    for end in (2, 7, 15):
        part = dense(teacher, tokens[:, :end]).reshape(3, end - 1, -1)
        assert torch.allclose(part, whole[:, : end - 1], atol=1e-5)


def test_rows_do_not_depend_on_the_batch(teacher: HFTeacher, tokens: torch.Tensor) -> None:
    single = torch.cat([dense(teacher, tokens[b : b + 1]) for b in range(3)])
    assert torch.allclose(single, dense(teacher, tokens), atol=1e-5)


def test_the_teacher_is_never_trained(teacher: HFTeacher, tokens: torch.Tensor) -> None:
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not dense(teacher, tokens).requires_grad


def test_padding_rows_are_masked_and_only_they_may_be_cut(
    make_model: Callable[..., Any], tokens: torch.Tensor, tmp_path: Path
) -> None:
    make_model(tmp_path / "m", rows=288)
    teacher = HFTeacher.open(tmp_path / "m")
    assert teacher.notes == ("teacher has 288 rows for 270 tokens: 18 padding rows are masked",)
    own = teacher.logits(tokens)
    assert own.shape[1] == 288
    assert torch.isneginf(own[:, 270:]).all()
    for width in (270, 280, 300):
        resized = teacher.logits(tokens, width=width)
        assert resized.shape[1] == width
        assert torch.equal(resized[:, :270], own[:, :270])
        assert torch.isneginf(resized[:, 270:]).all()
    with pytest.raises(RefusedError, match="269 columns cannot hold the teacher's 270 tokens"):
        teacher.logits(tokens, width=269)
    assert int(top(teacher, tokens, 1.0, 270).ids.max()) < 270
    with pytest.raises(RefusedError, match="k = 271 is larger than the vocabulary"):
        teacher.targets(tokens, temperature=1.0, k=271)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [None, 8, 5, 1])
def test_the_store_gives_the_live_rows_for_every_k_up_to_its_own(
    teacher: HFTeacher, store_path: Path, tokens: torch.Tensor, temperature: float, k: int | None
) -> None:
    with StoreTeacher.open(store_path, identity=teacher.identity) as stored:
        shuffled = tokens[[2, 0, 1]]
        kept, live = top(stored, shuffled, temperature, k), top(teacher, shuffled, temperature, k or 8)
    assert torch.equal(kept.ids, live.ids)
    rounding = torch.from_numpy(GRADED.error(live.logprobs.numpy()))
    assert ((kept.logprobs - live.logprobs).abs() <= rounding).all()
    assert ((kept.tail - live.tail).abs() <= TAIL_STEP + rounding.amax(-1)).all()
    assert kept.ids.shape == (45, k or 8)


def test_the_store_refuses_what_it_does_not_hold(store_path: Path, tokens: torch.Tensor) -> None:
    with StoreTeacher.open(store_path) as stored:
        with pytest.raises(RefusedError, match=r"temperature = 3: tails are stored for T = 1, 2 only") as caught:
            stored.targets(tokens, temperature=3.0)
        assert "score.temperatures" in str(caught.value.next)
        with pytest.raises(RefusedError, match="k = 9: the store holds 8"):
            stored.targets(tokens, temperature=1.0, k=9)
        with pytest.raises(RefusedError, match="no targets for 1 of 3"):
            stored.targets(tokens.index_fill(0, torch.tensor([1]), 7), temperature=1.0)
    with pytest.raises(RefusedError, match="teacher sha256"):
        StoreTeacher.open(store_path, identity=TeacherIdentity("Qwen3ForCausalLM", "0" * 64, "float32", "0" * 64))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused(teacher: HFTeacher, tokens: torch.Tensor, temperature: float) -> None:
    for backend in (teacher, FixtureTeacher(270)):
        with pytest.raises(RefusedError, match="temperature"):
            backend.targets(tokens, temperature=temperature)


@pytest.mark.parametrize("wrong", [[[1, 270]], [[-1, 2]], [[1]], [1, 2]])
def test_tokens_outside_the_vocabulary_or_shape_are_refused(teacher: HFTeacher, wrong: list[Any]) -> None:
    for backend in (teacher, FixtureTeacher(270)):
        with pytest.raises(RefusedError, match="token"):
            backend.targets(torch.tensor(wrong), temperature=1.0)


def test_sequences_longer_than_the_teachers_positions_are_refused(
    make_model: Callable[..., Any], tokens: torch.Tensor, tmp_path: Path
) -> None:
    make_model(tmp_path / "m", positions=14)
    with pytest.raises(RefusedError, match="16 tokens are longer than the teacher's 14 positions"):
        HFTeacher.open(tmp_path / "m").logits(tokens)


def test_a_tensor_that_is_missing_is_refused_rather_than_random(teacher_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError, match=r"lacks 1 tensor.*model\.layers\.1\.mlp\.up_proj\.weight"):
        HFTeacher.open(folder)


def test_a_model_that_transformers_does_not_know_is_refused(teacher_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nobodys_model"}))
    with pytest.raises(RefusedError, match="transformers cannot load teacher"):
        HFTeacher.open(folder)


def test_code_in_a_models_folder_is_not_run(teacher_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "m"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError):
        HFTeacher.open(folder)
    assert not (tmp_path / "ran").exists()
