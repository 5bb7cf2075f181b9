"""A folder as a writer: found where it lies, and refused by name where a part of it is not what was trained."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentforge.data.tokenizer import EOS, Tokenizer
from latentforge.errors import RefusedError
from latentforge.evidence.digests import file_sha256
from latentforge.students.latent.codec import Codec, CodecShape, new_codec
from latentforge.students.latent.generate import Request, Sampling, generate
from latentforge.writers.opening import open_writer

from ..latent_folders import CHUNK, VOCABULARY, Folders


@pytest.fixture
def copied(folders: Folders, tmp_path: Path) -> Path:
    """A latent run's folder to break."""
    return Path(shutil.copytree(folders.latent, tmp_path / "latent-run"))


@pytest.mark.parametrize("below", [".", "out", "out/student"])
def test_a_latent_student_writes_from_wherever_in_its_run_it_is_opened(folders: Folders, below: str) -> None:
    writer = open_writer(folders.latent / below)
    assert (writer.kind, writer.model.chunk, writer.tokenizer.vocab_size) == ("latent", CHUNK, VOCABULARY)
    student, codec = folders.latent / "out/student", folders.latent / "out/student/codec"
    assert writer.digests == {
        "student": file_sha256(student / "model.safetensors"),
        "codec": file_sha256(codec / "model.safetensors"),
        "tokenizer": file_sha256(student / "tokenizer.json"),
    }
    prompt = tuple(writer.tokenizer.backend.encode("def main", add_special_tokens=False).ids)
    (found,) = generate(writer.model, [Request(prompt, 12, 1, Sampling("head", 0.5))])
    assert found.tokens


def test_a_token_level_student_writes_in_the_same_way(folders: Folders, tmp_path: Path) -> None:
    writer = open_writer(folders.token)
    assert (writer.kind, writer.model.chunk, writer.model.vocab_size) == ("token", 1, VOCABULARY)
    assert set(writer.digests) == {"student", "tokenizer"}
    (found,) = generate(writer.model, [Request((5, 6, 7), 12, 1, Sampling("head", 0.5))])
    assert found.tokens
    copy = Path(shutil.copytree(folders.token / "out/student", tmp_path / "somewhere"))
    assert open_writer(copy, cache=False).digests == writer.digests
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Pwned()))
    with pytest.raises(RefusedError, match=r"no model\.safetensors; it has pytorch_model\.bin, a pickle"):
        open_writer(copy)
    (copy / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(RefusedError, match=r"model\.safetensors is truncated"):
        open_writer(copy)


def test_a_copy_anywhere_is_the_same_writer_and_a_cache_changes_nothing(folders: Folders, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders.latent / "out/student", tmp_path / "somewhere"))
    requests = [Request((5, 6, 7, 8, 9), 30, seed) for seed in range(3)]
    first = open_writer(folders.latent)
    assert open_writer(copy).digests == first.digests
    assert generate(open_writer(copy, cache=False).model, requests) == generate(first.model, requests)


def test_a_prompt_begins_as_the_documents_of_its_tokenizer_do(copied: Path) -> None:
    plain = open_writer(copied).encode("def <|endoftext|>")
    student = copied / "out/student"
    other = Tokenizer.open(student)
    assert plain == tuple(next(other.encode(["def <|endoftext|>"]))[1][:-1].tolist())
    config = json.loads((student / "tokenizer_config.json").read_text())
    for bos, before in (("a", (other.backend.token_to_id("a"),)), (EOS, ())):
        _redescribe(student / "tokenizer_config.json", **{**config, "add_bos_token": True, "bos_token": bos})
        assert open_writer(copied).encode("def <|endoftext|>") == (*before, *plain)


class Pwned:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (Path("pwned"),))


def _altered(student: Path) -> None:
    content = bytearray((student / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (student / "model.safetensors").write_bytes(content)


def _as_pickle(student: Path) -> None:
    (student / "model.safetensors").unlink()
    (student / "model.pt").write_bytes(pickle.dumps(Pwned()))


def _pickle_as_safetensors(student: Path) -> None:
    weights = student / "model.safetensors"
    weights.write_bytes(pickle.dumps(Pwned()))
    _redescribe(student / "student.json", digest=file_sha256(weights))


def _redescribe(description: Path, **values: Any) -> None:
    description.write_text(json.dumps({**json.loads(description.read_text()), **values}))


def _other_tokenizer(student: Path) -> None:
    file = student / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"].pop()
    file.write_text(json.dumps(content))


def _other_codec(student: Path) -> None:
    record = Codec.open(student / "codec").record
    assert record is not None
    other = new_codec(CodecShape(VOCABULARY, CHUNK, 32, 32, 64), seed=9)
    other.save(student / "codec", eos_id=record.eos_id, tokenizer_sha256=record.tokenizer_sha256, latent_std=1.0)


def _other_end(student: Path) -> None:
    _redescribe(student / "tokenizer_config.json", eos_token="a")


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (_altered, r"student/model\.safetensors is sha256 [0-9a-f]{12}…, student\.json says"),
    (lambda s: _altered(s / "codec"), r"codec/model\.safetensors is sha256 [0-9a-f]{12}…, codec\.json says"),
    (_as_pickle, r"student holds no model\.safetensors; it has model\.pt, a pickle, which is never read"),
    (_pickle_as_safetensors, r"student/model\.safetensors cannot be read"),
    (_other_tokenizer, r"codec of tokenizer [0-9a-f]{12}…, the data's is"),
    (_other_codec, r"student of codec [0-9a-f]{12}…, [0-9a-f]{12}… was given"),
    (_other_end, r"texts end with id 0 of the student, 0 of the codec and \d+ of the tokenizer"),
    (lambda s: shutil.rmtree(s / "codec"), r"student/codec holds no codec\.json"),
    (lambda s: (s / "tokenizer.json").unlink(), r"student has no tokenizer\.json"),
    (lambda s: (s / "student.json").unlink(), r"holds a codec and no student"),
    (lambda s: (s / "student.json").write_text("{"), r"student\.json is not JSON"),
    (lambda s: _redescribe(s / "student.json", schema=2), r"student\.json has schema 2"),
    (shutil.rmtree, r"holds no student: no student\.json and no config\.json"),
]


@pytest.mark.parametrize(("broken", "words"), BROKEN)
def test_a_part_that_is_not_what_was_trained_is_refused_by_name(
    copied: Path, broken: Callable[[Path], object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copied)
    broken(copied / "out/student")
    with pytest.raises(RefusedError, match=words):
        open_writer(copied)
    assert not (copied / "pwned").exists()


def test_a_file_that_the_run_did_not_leave_so_is_refused(copied: Path) -> None:
    """Nothing in the folder itself says what the merges of the tokenizer's configuration were."""
    file = copied / "out/student/tokenizer_config.json"
    listed = [{"path": "out/student/tokenizer_config.json", "sha256": file_sha256(file)}]
    (copied / "artifacts.json").write_text(json.dumps({"files": listed}))
    open_writer(copied)
    file.write_text(file.read_text() + "\n")
    with pytest.raises(RefusedError, match=r"tokenizer_config\.json is sha256 .* artifacts\.json of its run says"):
        open_writer(copied)


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere", "nowhere does not exist"), ("weights.pt", "is a pickle, which is never read"), ("a.txt", "is a file")],
)
def test_what_is_no_folder_is_refused_by_its_path(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(Pwned()))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(RefusedError, match=words):
        open_writer(tmp_path / name)


@pytest.mark.parametrize("device", ["tpu", "cuda:9", "meta", "gpu"])
def test_a_device_that_is_not_there_is_refused_by_its_name(folders: Folders, device: str) -> None:
    with pytest.raises(RefusedError, match=f"device = '{device}'"):
        open_writer(folders.latent, device=device)
