"""Weights tensor by tensor: the numbers under their names, whatever file holds them; and what a data run read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from latentforge.evidence.checks import planted_run, recorded_run
from latentforge.evidence.manifest import record
from latentforge.evidence.statement import build_statement
from latentforge.evidence.tensors import tensor_digests
from latentforge.evidence.verify import verify_evidence
from latentforge.verdicts import Outcome

WEIGHTS = "out/student/model.safetensors"


def forged(runs: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A run whose statement was changed before it was written: every digest is right, the words are not."""
    run_dir = planted_run(runs)
    statement = build_statement(run_dir, plan=None, host={}, dispatched={}, environ={})
    change(statement["predicate"])
    record(run_dir, statement)
    return run_dir


def test_the_digests_are_those_of_the_numbers_and_not_of_the_file(tmp_path: Path) -> None:
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(3, np.int64), "none": np.zeros((0, 4))}
    save_file(tensors, tmp_path / "one.safetensors", metadata={"format": "pt"})
    save_file(dict(reversed(tensors.items())), tmp_path / "two.safetensors", metadata={"made": "later"})
    found = tensor_digests(tmp_path / "one.safetensors")
    assert found == tensor_digests(tmp_path / "two.safetensors")
    assert found is not None
    assert list(found) == ["a", "b", "none"]
    assert found["b"] == {
        "dtype": "F32",
        "shape": [2, 3],
        "sha256": hashlib.sha256(tensors["b"].astype("<f4").tobytes()).hexdigest(),
    }


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{}"])
def test_what_is_no_weights_file_has_no_tensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert tensor_digests(path) == ({} if content.endswith(b"{}") else None)


def weights(path: Path, header: str, data: bytes = b"1234") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    return path


ENTRY = '"dtype":"U8","shape":[2],"data_offsets":[0,2]'


@pytest.mark.parametrize(
    "header",
    [
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,5]}}',
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":[-1,2]}}',
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":[3,1]}}',
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":["x",2]}}',
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0]}}',
        '{"a":{"dtype":"U8","shape":[1e300],"data_offsets":[0,2]}}',
        '{"a":{"dtype":"U8","shape":"12","data_offsets":[0,2]}}',
        '{"a":{"dtype":7,"shape":[2],"data_offsets":[0,2]}}',
        '{"a":{"dtype":"U8"}}',
        '{"a":[]}',
        f'{{"a":{{{ENTRY}}},"a":{{{ENTRY}}}}}',
        f'{{"\\ud800":{{{ENTRY}}}}}',
        f'{{"a":{{{ENTRY}}},"b":{{{ENTRY}}},"c":{{{ENTRY}}}}}',
    ],
)
def test_a_header_that_no_library_would_read_is_no_weights_file(tmp_path: Path, header: str) -> None:
    assert tensor_digests(weights(tmp_path / "good", f'{{"a":{{{ENTRY}}}}}')) is not None
    assert tensor_digests(weights(tmp_path / "x", header)) is None


def test_a_manifest_names_each_tensor_of_the_weights(run_dir: Path) -> None:
    identities = json.loads((run_dir / "manifest.json").read_bytes())["predicate"]["identities"]
    assert identities["tensors"] == {WEIGHTS: tensor_digests(run_dir / WEIGHTS)}
    assert identities["data_files"] is None


@pytest.mark.parametrize(
    ("part", "lie"),
    [
        ("tensors", lambda p: p["identities"]["tensors"][WEIGHTS]["embed.weight"].update(sha256="0" * 64)),
        ("tensors", lambda p: p["identities"]["tensors"][WEIGHTS].pop("embed.weight")),
        ("data_files", lambda p: p["identities"].update(data_files={"files": 1, "sha256": "0" * 64})),
        ("schema 2", lambda p: p["identities"].pop("tensors")),
        ("schema 1", lambda p: p.update(schema=1)),
    ],
)
def test_tensors_that_do_not_follow_from_the_weights_are_refuted(
    tmp_path: Path, part: str, lie: Callable[[dict[str, Any]], Any]
) -> None:
    result = verify_evidence(forged(tmp_path, lie))
    assert result.outcome is Outcome.FAIL
    assert any(part in problem.text for problem in result.problems)


def test_a_manifest_from_before_tensors_were_named_still_verifies(tmp_path: Path) -> None:
    def before(predicate: dict[str, Any]) -> None:
        predicate["schema"] = 1
        del predicate["identities"]["tensors"], predicate["identities"]["data_files"]

    assert verify_evidence(forged(tmp_path, before)).outcome is Outcome.PASS


def test_a_data_runs_files_are_named_by_the_digest_of_their_order(tmp_path: Path) -> None:
    run_dir = planted_run(tmp_path)
    line = '{"split": "train", "name": "a.txt", "bytes": 1, "sha256": "00"}\n'
    (run_dir / "out" / "corpus.jsonl").write_text(line * 3)
    statement = build_statement(run_dir, plan=None, host={}, dispatched={}, environ={})
    sha256 = hashlib.sha256((line * 3).encode()).hexdigest()
    assert statement["predicate"]["identities"]["data_files"] == {"files": 3, "sha256": sha256}
    record(run_dir, statement)
    assert verify_evidence(run_dir).outcome is Outcome.PASS
    assert verify_evidence(recorded_run(tmp_path / "other")).outcome is Outcome.PASS
