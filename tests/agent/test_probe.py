"""Probing: what a host says about itself, its runs, and the user's corpora and models."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch.agent import folders, hardware
from dispatch.agent.paths import Root
from dispatch.agent.protocol import AgentError

from .conftest import AgentHost, snapshot


def test_a_probe_changes_nothing_on_a_host_with_runs(host: AgentHost) -> None:
    finished, reserved = host.ran("pass")["run"], host.python("pass")
    before = snapshot(host.dir)
    probe = host.call("probe", runs=[{"id": finished, "kin": "kin"}, {"id": reserved}], kins=["kin", "none"])
    assert snapshot(host.dir) == before
    assert probe["runs"][finished]["outcome"] == "pass"
    assert probe["runs"][reserved]["state"] == "reserved"
    kin = {row["id"]: row for row in probe["kin_runs"]["kin"]}
    assert (kin[finished]["state"], kin[finished]["code_sha256"], kin[finished]["attempt"]) == ("finished", "c0de", 1)
    assert kin[reserved]["state"] == "reserved"
    assert probe["kin_runs"]["none"] == []


def test_a_host_describes_itself(host: AgentHost) -> None:
    probe = host.call("probe", builds=["b1"], venvs=["v1", "/usr"])
    assert probe["host"]["mem_total"] > probe["host"]["mem_available"] > 0
    assert probe["host"]["cores"] == len(os.sched_getaffinity(0))
    assert probe["host"]["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert probe["host"]["disk_free"] > 0
    assert probe["python"]["version"].startswith("3.")
    assert (probe["builds"], probe["venvs"]) == ({"b1": False}, {"v1": False, "/usr": False})
    assert probe["lease"] == {"device": None}
    assert (probe["root"], probe["root_exists"]) == (str(host.dir), False)


@pytest.mark.parametrize("below", ["", "state/latentforge"])
def test_a_state_root_that_is_a_file_is_refused_by_name(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AgentError) as refused:
        Root(str(tmp_path / "file" / below))
    assert (refused.value.kind, refused.value.code) == ("refused", 2)
    assert f"{tmp_path / 'file'} is not a folder" in refused.value.message
    assert refused.value.next == "set GX10_REPO_PATH to a folder of your own"


_ANSWER = "NVIDIA GB10, GPU-1b2c, 580.142, 12.1, [N/A], [Not Supported], 3, 41, 11.52\n"


def test_gpu_memory_that_the_driver_does_not_tell_is_unknown_not_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncase $1 in *gpu=*) printf '{_ANSWER}';; *) echo '4711, python, [N/A]';; esac\n")
    program.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    facts = hardware.host(tmp_path)
    (gpu,) = facts["gpus"]
    assert (gpu["name"], gpu["memory.total"], gpu["memory.used"]) == ("NVIDIA GB10", None, None)
    assert (gpu["utilization.gpu"], gpu["power.draw"], facts["driver"]) == (3.0, 11.52, "580.142")
    assert facts["gpu_processes"] == [{"pid": 4711, "name": "python", "memory": None}]


def test_a_driver_that_fails_is_no_gpu_rather_than_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.host(tmp_path)["gpus"] == []


def _tensor(values: int = 4, name: str = "w") -> tuple[dict[str, Any], bytes]:
    return {name: {"dtype": "F32", "shape": [values], "data_offsets": [0, 4 * values]}}, bytes(4 * values)


def _safetensors(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _model(folder: Path, weights: bytes | None = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen3", "vocab_size": 7}')
    (folder / "model.safetensors").write_bytes(_safetensors(*_tensor()) if weights is None else weights)
    return folder


def test_a_good_model_folder_is_described(tmp_path: Path) -> None:
    facts = folders.inspect(str(_model(tmp_path / "m")), "model")
    assert (facts["ok"], facts["parameters"], facts["vocab_size"], facts["files"]) == (True, 4, 7, 2)
    assert facts["sha256"] == folders.tree_digest(tmp_path / "m")[0]


def test_a_sharded_model_folder_is_described(tmp_path: Path) -> None:
    folder = _model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model-2.safetensors").write_bytes(_safetensors(*_tensor(8, "v")))
    index = {"weight_map": {"w": "model-1.safetensors", "v": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert folders.inspect(str(folder), "model")["parameters"] == 12
    (folder / "model-2.safetensors").unlink()
    assert "model-2.safetensors is missing" in folders.inspect(str(folder), "model")["reason"]


_HEADER, _DATA = _tensor()
_OVERLAP = {**_HEADER, "v": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}
_WRONG_SIZE = {"w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        (_safetensors(_HEADER, _DATA)[:-1], "is truncated"),
        (_safetensors(_HEADER, _DATA)[:40], "its header alone claims"),
        (_safetensors(_HEADER, _DATA)[:5], "has 5 bytes"),
        (b"", "has 0 bytes"),
        (_safetensors(_HEADER, _DATA + b"x"), "bytes too many"),
        (struct.pack("<Q", 1 << 62) + b"{}", "claims"),
        (_safetensors(b"{not json}", b""), "corrupt safetensors header"),
        (_safetensors(b"[]", b""), "not an object"),
        (_safetensors({}, b""), "holds no tensor"),
        (_safetensors({"w": {"dtype": "F32"}}, b""), "tensor 'w'"),
        (_safetensors({"w": {"dtype": "F32", "shape": [4], "data_offsets": [4, 0]}}, _DATA), "tensor 'w'"),
        (_safetensors(_WRONG_SIZE, _DATA), "tensor 'w'"),
        (_safetensors(_OVERLAP, _DATA), "overlap"),
    ],
)
def test_damaged_weights_are_refused_with_file_and_remedy(tmp_path: Path, weights: bytes, told: str) -> None:
    facts = folders.inspect(str(_model(tmp_path / "m", weights)), "model")
    assert facts["ok"] is False
    assert told in facts["reason"]
    assert "model.safetensors" in facts["reason"]
    assert "again" in facts["next"]


@settings(max_examples=150)
@given(st.integers(0, 150), st.integers(0, 7))
def test_a_flipped_bit_in_a_header_never_crashes_the_check(
    tmp_path_factory: pytest.TempPathFactory, byte: int, bit: int
) -> None:
    data = bytearray(_safetensors(_HEADER, _DATA))
    data[byte % len(data)] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(data)
    with contextlib.suppress(folders.Unfit):
        folders.check_safetensors(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickle"),
    ],
)
def test_a_model_folder_that_lacks_a_part_is_refused(tmp_path: Path, change: Any, told: str) -> None:
    folder = _model(tmp_path / "m")
    change(folder)
    facts = folders.inspect(str(folder), "model")
    assert (facts["ok"], facts["sha256"]) == (False, None)
    assert told in facts["reason"]
    assert facts["next"]


def test_a_missing_model_is_refused_by_name(tmp_path: Path) -> None:
    assert str(tmp_path / "no") in folders.inspect(str(tmp_path / "no"), "model")["reason"]


def test_a_corpus_is_counted_and_hashed(host: AgentHost, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "deep").mkdir(parents=True)
    (corpus / "deep" / "a.md").write_text("words")
    (corpus / "b.py").write_text("print()")
    (corpus / "c.bin").write_text("not a document")
    facts = host.call("probe", paths=[{"path": str(corpus), "purpose": "corpus"}])["paths"][str(corpus)]
    assert (facts["ok"], facts["documents_files"], facts["documents_bytes"], facts["files"]) == (True, 2, 12, 3)
    assert facts["sha256"] == folders.tree_digest(corpus)[0]


@pytest.mark.parametrize(
    ("files", "path", "told"),
    [
        ({}, "missing", "does not exist"),
        ({"corpus/x.bin": "data"}, "corpus", "holds no .txt"),
        ({"corpus/x.txt": ""}, "corpus", "is empty"),
        ({"x.txt": ""}, "x.txt", "is empty"),
        ({"x.pdf": "data"}, "x.pdf", ".pdf"),
    ],
)
def test_a_corpus_that_holds_nothing_is_refused(tmp_path: Path, files: dict[str, str], path: str, told: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    facts = folders.inspect(str(tmp_path / path), "corpus")
    assert facts["ok"] is False
    assert told in facts["reason"]
    assert str(tmp_path / path) in facts["reason"]
    assert facts["next"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"text\xff\xfe", "is not UTF-8: byte 0xff at offset 4"),
        ("a.txt", b"x" * (1 << 20) + "é".encode()[:1], "is not UTF-8: byte 0xc3 at offset 1048576"),
        ("a.txt", b"x" * ((1 << 20) - 1) + b"\xc3(", "is not UTF-8: byte 0xc3 at offset 1048575"),
        ("a.jsonl", b'{"text":"x"}\n{nope\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text":"x"}\n\n{"txt":"y"}\n', "line 3 has no \"text\" (it has: 'txt')"),
        ("a.jsonl", b'{"text":3}\n', 'line 1: "text" is int, not a string'),
        ("a.jsonl", b"[1]\n", 'line 1 has no "text" (it has: list)'),
        ("a.jsonl", b'{"text":"x"}\n{"text":"\xff"}\n', "is not UTF-8: byte 0xff at offset 22"),
    ],
)
def test_a_corpus_that_is_not_text_is_refused_with_the_place(
    tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    from latentforge.data.corpus import Corpus
    from latentforge.errors import RefusedError

    (tmp_path / name).write_bytes(content)
    facts = folders.inspect(str(tmp_path / name), "corpus")
    assert (facts["ok"], facts["sha256"]) == (False, None)
    assert f"{tmp_path / name} {told}" in facts["reason"]
    assert facts["next"]
    with pytest.raises(RefusedError) as refused:  # what the data run would have said, after it was launched
        Corpus.open(tmp_path / name)
    assert str(refused.value) == facts["reason"]


def test_text_in_any_script_with_a_mark_and_blank_lines_is_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "日é\n".encode() * 400_000)  # characters across chunks
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + '{"text":"日"}\n\n \n{"text":"","n":1}'.encode())
    assert folders.inspect(str(tmp_path), "corpus")["ok"] is True


def _tokenizer(folder: Path, tokens: list[str]) -> Path:
    model = {"type": "BPE", "vocab": {token: number for number, token in enumerate(tokens)}, "merges": []}
    added = [{"id": len(tokens), "content": "<|end|>", "special": True}]
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    return folder


def test_a_student_whose_vocabulary_differs_in_one_token_is_refused_with_its_id(tmp_path: Path) -> None:
    teacher = _tokenizer(_model(tmp_path / "t"), ["a", "b", "c"])
    student = _tokenizer(_model(tmp_path / "s"), ["a", "b", "c"])
    assert folders.inspect(str(student), "model", str(teacher))["ok"] is True
    _tokenizer(student, ["a", "c", "b"])
    facts = folders.inspect(str(student), "model", str(teacher))
    assert facts["ok"] is False
    assert "differ first at id 1" in facts["reason"]
    assert "has 'b' (4 tokens)" in facts["reason"]
    assert facts["next"] == "use the teacher's tokenizer for the student"
    _tokenizer(student, ["a", "b"])
    assert "at id 2: " in folders.inspect(str(student), "model", str(teacher))["reason"]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": {"vocab": 3}}', '{"model": {"vocab": [[]]}}'])
def test_a_broken_tokenizer_is_refused_not_compared(tmp_path: Path, content: str) -> None:
    teacher, student = _tokenizer(_model(tmp_path / "t"), ["a"]), _model(tmp_path / "s")
    assert "has no tokenizer.json" in folders.inspect(str(student), "model", str(teacher))["reason"]
    (student / "tokenizer.json").write_text(content)
    assert "is not a tokenizer" in folders.inspect(str(student), "model", str(teacher))["reason"]
    assert "is not a tokenizer" in folders.inspect(str(student), "model")["reason"]  # a teacher is compared to none


def test_a_relative_path_is_refused_since_it_means_another_place_here() -> None:
    facts = folders.inspect("corpus", "corpus")
    assert "'corpus' is not an absolute path" in facts["reason"]


_NAMES = st.text("ab.é日-", min_size=1, max_size=4).filter(lambda name: name not in (".", ".."))
_TREES = st.dictionaries(st.lists(_NAMES, min_size=1, max_size=3).map(tuple), st.binary(max_size=20), max_size=6)


@settings(max_examples=60)
@given(tree=_TREES)
def test_the_agents_digest_of_a_folder_is_the_evidences(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[tuple[str, ...], bytes]
) -> None:
    from latentforge.evidence.digests import tree_sha256

    folder = tmp_path_factory.mktemp("tree")
    for parts, data in tree.items():
        path = folder.joinpath(*parts)
        if any(parent.is_file() for parent in path.parents) or path.is_dir():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert folders.tree_digest(folder)[0] == tree_sha256(folder)


def test_a_link_inside_counts_and_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    from latentforge.evidence.digests import tree_sha256

    folder = _model(tmp_path / "m")
    os.symlink("config.json", folder / "again.json")
    assert folders.inspect(str(folder), "model")["sha256"] == tree_sha256(folder)
    os.symlink("/etc/hostname", folder / "out.json")
    assert "leads out" in folders.inspect(str(folder), "model")["reason"]
