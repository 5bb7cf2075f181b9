"""A model folder is found whole or refused by name, before anything loads it."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from latentforge.errors import RefusedError
from latentforge.teachers.folder import check_model_folder, read_safetensors_header
from latentforge.teachers.likeness import check_unlike, same_weights


@pytest.fixture
def folder(teacher_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(teacher_folder, tmp_path / "model"))


def refused(path: Path) -> str:
    with pytest.raises(RefusedError) as caught:
        check_model_folder(path, digest=False)
    return str(caught.value)


def test_a_whole_folder_is_described_by_its_content(folder: Path) -> None:
    found = check_model_folder(folder)
    tensors = load_file(folder / "model.safetensors")
    assert (found.vocab_size, found.tokens) == (270, 270)
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert (found.architecture, found.max_positions) == ("Qwen3ForCausalLM", 64)
    assert len(found.sha256) == len(found.weights_sha256) == 64
    assert check_model_folder(folder, digest=False).parameters == found.parameters


def test_a_missing_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    assert "absent does not exist" in refused(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    assert "is a file, not a folder" in refused(tmp_path / "file")


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "names no model_type"),
        ('{"model_type": "qwen3"}', "vocab_size is None"),
        ('{"model_type": "qwen3", "vocab_size": "270"}', "vocab_size is '270'"),
        ('{"model_type": "qwen3", "vocab_size": 271}', "has shape [270, 32], config.json says vocab_size = 271"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(folder: Path, content: str, said: str) -> None:
    (folder / "config.json").write_text(content)
    assert said in refused(folder)


def test_a_tokenizer_with_more_tokens_than_embedding_rows_is_refused(folder: Path) -> None:
    value = json.loads((folder / "tokenizer.json").read_text())
    value["added_tokens"].append({**value["added_tokens"][0], "id": 270, "content": "<extra>"})
    (folder / "tokenizer.json").write_text(json.dumps(value))
    assert "has 270 embedding rows for the 271 tokens of its tokenizer.json" in refused(folder)
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer.json cannot be read" in refused(folder)
    (folder / "tokenizer.json").unlink()
    assert check_model_folder(folder, digest=False).tokens is None


def test_a_folder_without_weights_is_refused_and_other_formats_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "without weights: no model.safetensors" in refused(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "it has pytorch_model.bin, which is not read" in refused(folder)


def test_a_git_lfs_pointer_is_not_taken_for_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert "Git LFS pointer" in refused(folder)


def test_weights_cut_at_any_byte_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, whole, metadata={"format": "pt"})
    content = whole.read_bytes()
    assert {tensor.name: tensor.shape for tensor in read_safetensors_header(whole)} == {"a": (2, 3), "b": (4,)}
    cut = tmp_path / "cut.safetensors"
    for size in range(len(content)):
        cut.write_bytes(content[:size])
        with pytest.raises(RefusedError, match=r"cut\.safetensors"):
            read_safetensors_header(cut)
    cut.write_bytes(content + b"\0")
    with pytest.raises(RefusedError, match="longer than its header says"):
        read_safetensors_header(cut)


def test_a_teacher_whose_weights_are_cut_is_refused_by_name(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for part in (0.0, 0.001, 0.01, 0.5, 0.999):
        weights.write_bytes(content[: int(len(content) * part)])
        assert "model.safetensors is truncated" in refused(folder)


@settings(max_examples=150)
@given(data=st.data())
def test_a_header_with_changed_bytes_is_refused_or_still_describes_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("h") / "m.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4)}, path)
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        tensors = read_safetensors_header(path)
    except RefusedError:
        return
    assert (
        sum(tensor.end - tensor.start for tensor in tensors) == len(content) - 8 - struct.unpack("<Q", content[:8])[0]
    )
    load_file(path)  # what is let through, the library reads too


def with_header(path: Path, header: Any, payload: bytes) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + payload)
    return path


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": {}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}},
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
        b"{\xff}",
        b"[" * 5000,
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: Any) -> None:
    with pytest.raises(RefusedError, match=r"m\.safetensors"):
        read_safetensors_header(with_header(tmp_path / "m.safetensors", header, bytes(8)))


def test_a_header_length_beyond_the_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(RefusedError, match="its header claims 1152921504606846976 bytes"):
        read_safetensors_header(tmp_path / "m.safetensors")


@pytest.fixture
def sharded(make_model: Callable[..., Any], tmp_path: Path) -> Path:
    make_model(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    return tmp_path / "sharded"


def test_a_missing_shard_is_refused_by_name(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"is without {shard.name}, which its index names" in refused(sharded)


def test_an_index_that_names_what_is_not_there_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    name = next(iter(value["weight_map"].values()))
    value["weight_map"]["planted.weight"] = name
    index.write_text(json.dumps(value))
    assert "does not hold tensor 'planted.weight'" in refused(sharded)
    value["weight_map"]["planted.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(value))
    assert "is not a file of the folder" in refused(sharded)
    index.write_text("{}")
    assert "cannot be read" in refused(sharded)


def test_a_copy_in_other_files_under_another_name_has_the_same_weights(teacher_folder: Path, sharded: Path) -> None:
    assert same_weights(teacher_folder, sharded)
    assert check_model_folder(teacher_folder).sha256 == check_model_folder(sharded).sha256


def test_one_changed_number_is_another_model(folder: Path, teacher_folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert not same_weights(teacher_folder, folder)


def test_the_same_weights_under_another_configuration_are_another_teacher(folder: Path, teacher_folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "0", "_name_or_path": "x"}))
    assert check_model_folder(folder).sha256 == check_model_folder(teacher_folder).sha256
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert check_model_folder(folder).sha256 != check_model_folder(teacher_folder).sha256
    assert same_weights(teacher_folder, folder)


def test_a_teacher_equal_to_its_student_is_refused_for_full_and_said_for_smoke(
    teacher_folder: Path, folder: Path, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match="teacher and student are the same model"):
        check_unlike(teacher_folder, folder, profile="full")
    said = check_unlike(teacher_folder, folder, profile="smoke")
    assert said is not None
    assert "smoke only" in said
    make_model(tmp_path / "other", seed=2)
    assert check_unlike(teacher_folder, tmp_path / "other", profile="full") is None
