"""The backend `vllm-local`: a server that lives as long as the teacher that a run opened."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from latentforge.errors import CrashedError, RefusedError
from latentforge.spec.sections import TeacherSpec
from latentforge.teachers.cached import CachedTeacher
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.hf import HFTeacher
from latentforge.teachers.opening import open_teacher
from latentforge.teachers.serving.local import ServedTeacher, settings_of
from latentforge.teachers.serving.settings import ServingSettings

from .conftest import Stub, gone


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def served(
    teacher_folder: Path, stub_environment: Path, stub: Stub, tmp_path: Path, said: list[str]
) -> Iterator[ServedTeacher]:
    """The teacher as a run opens it, before a stub."""
    spec = TeacherSpec(backend="vllm-local", environment=str(stub_environment))
    env = {**stub.behaving("good"), "XDG_STATE_HOME": str(tmp_path / "state")}
    found = open_teacher(spec, teacher_folder, "cpu", env, say=said.append)
    assert isinstance(found, ServedTeacher)
    found.server.memory_seconds = 0.0  # what other tests take meanwhile is no concern of these
    yield found
    found.close()


def test_a_run_opens_a_server_and_closes_it_with_all_below_it(
    served: ServedTeacher, stub: Stub, said: list[str], tmp_path: Path
) -> None:
    assert len(stub.pids) == 3
    assert served.server.kept.log.is_relative_to(tmp_path / "state")
    served.close()
    assert all(gone(pid, seconds=0.0) for pid in stub.pids)
    assert "starts vLLM" in said[0]
    assert said[-1].startswith("memory is")
    served.close()
    assert said[-2] != said[-1]


@pytest.mark.parametrize("backend", ["vllm-local", "vllm-local-inproc"])
def test_a_run_starts_no_engine_whose_cache_cannot_be_pinned(
    backend: Literal["vllm-local", "vllm-local-inproc"],
    teacher_folder: Path,
    stub_environment: Path,
    stub: Stub,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(teacher_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["num_hidden_layers"], config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config))
    spec = TeacherSpec(backend=backend, environment=str(stub_environment))
    env = {**stub.behaving("good"), "XDG_STATE_HOME": str(tmp_path / "state")}
    with pytest.raises(RefusedError, match="takes 80% of all memory") as refused:
        open_teacher(spec, folder, "cpu", env)
    assert "--kv-cache-bytes" in str(refused.value.next)
    assert stub.pids == []


def test_a_run_whose_rows_are_all_stored_starts_no_server(
    teacher_folder: Path, stub_environment: Path, stub: Stub, tmp_path: Path, said: list[str]
) -> None:
    cache = tmp_path / "cache.sqlite"
    spec = TeacherSpec(backend="vllm-local", environment=str(stub_environment), cache=str(cache))
    env = {**stub.behaving("good"), "XDG_STATE_HOME": str(tmp_path / "state")}
    teacher = open_teacher(spec, teacher_folder, "cpu", env, say=said.append, k=4)
    assert isinstance(teacher, CachedTeacher)
    tokens, other = np.arange(1, 9), np.arange(2, 10)
    here = HFTeacher.open(teacher_folder)
    teacher.store.put_many([(tokens, row) for _, row in here.score([tokens], k=4, temperatures=(1.0,))])
    try:
        ((_, stored),) = teacher.score([tokens], k=4, temperatures=(1.0,))
        assert stored.ids.shape == (7, 4)
        assert teacher.notes
        assert not stub.pids, "a server was started for what is stored"
        assert isinstance(teacher.teacher, ServedTeacher)
        assert not teacher.teacher.started
        # The control: a row that must be asked starts it. (The stub answers no row that could be believed.)
        teacher.teacher.flow.attempts = 1
        with pytest.raises(TeacherFailure):
            list(teacher.score([other], k=4, temperatures=(1.0,)))
        assert len(stub.pids) == 3
        teacher.teacher.server.memory_seconds = 0.0
    finally:
        teacher.close()
    assert all(gone(pid, seconds=0.0) for pid in stub.pids)


def test_its_identity_is_the_folders_content_and_that_vllm_computes(
    served: ServedTeacher, teacher_folder: Path
) -> None:
    here = HFTeacher.open(teacher_folder).identity
    assert (served.identity.model, served.identity.sha256) == (here.model, here.sha256)
    assert served.identity.tokenizer_sha256 == here.tokenizer_sha256
    assert served.identity.quantization == "vllm/float32"


def test_a_server_that_ends_in_mid_run_is_told_with_its_last_lines(served: ServedTeacher, stub: Stub) -> None:
    os.kill(served.server.kept.pid, signal.SIGKILL)
    assert served.server.kept.wait(60.0) is not None
    served.flow.attempts = 1
    with pytest.raises(CrashedError, match="vLLM was ended by SIGKILL"):
        _ = served.limits


def test_a_run_computes_as_it_is_told_and_caps_no_k(teacher_folder: Path, stub_environment: Path) -> None:
    def settings(**values: object) -> ServingSettings:
        spec = TeacherSpec.model_validate({"environment": str(stub_environment), **values})
        return settings_of(spec, teacher_folder, {})

    assert settings().dtype == "float32"
    assert settings(precision="bf16").dtype == "bfloat16"
    assert settings().max_logprobs == -1
    assert settings(gpu_memory_utilization=0.5).utilisation == 0.5
