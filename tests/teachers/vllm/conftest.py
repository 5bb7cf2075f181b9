"""A real vLLM: one server for all tests of this folder, in an environment of its own, serving a model trained here.

The environment is `.venv-vllm` beside the project (`make test` makes it), or what LATENTFORGE_VLLM_ENVIRONMENT names.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from latentforge.data import ShardSet
from latentforge.spec.run import RunDir
from latentforge.targets.row import SequenceTargets
from latentforge.teachers.hf import HFTeacher
from latentforge.teachers.http.openai import OpenAITeacher
from latentforge.teachers.serving.processes import members
from latentforge.teachers.serving.server import VLLMServer
from latentforge.teachers.serving.settings import ServingSettings
from latentforge.train.inprocess import execute_pipeline
from latentforge.train.rehearsal import tiny_spec

from ..proxy import FaultProxy

_ROOT = Path(__file__).parents[3]
_SECONDS_A_TEST = 900
LENGTH = 48
K = 20
TOLERANCE = 1e-4
Rows = dict[int, SequenceTargets]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whichever test comes first waits for the server, for minutes where the machine is busy: all of them are slow."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(_SECONDS_A_TEST))
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def vllm_environment() -> Path:
    """The folder of an environment with vLLM."""
    named = os.environ.get("LATENTFORGE_VLLM_ENVIRONMENT")
    environment = Path(named) if named else _ROOT / ".venv-vllm"
    if not (environment / "bin" / "python").exists():
        pytest.skip(f"no environment with vLLM at {environment}: make .venv-vllm/.packages")
    return environment


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """A data and a teacher run, made by the project's own recipes."""
    spec = tiny_spec()
    spec = spec.model_copy(
        update={
            # vLLM's attention on a CPU wants heads of 32 numbers or more.
            "teacher": spec.teacher.model_copy(update={"steps": 30, "heads": 2, "kv_heads": 1}),
            "data": spec.data.model_copy(
                update={"train_sequences": 64, "heldout_sequences": 8, "sequence_length": LENGTH}
            ),
        }
    )
    return execute_pipeline(spec, tmp_path_factory.mktemp("vllm"), through="teacher", text=io.StringIO())


@pytest.fixture(scope="session")
def served_folder(upstream: dict[str, RunDir]) -> Path:
    """The model folder that the server serves; as a tokenizer and for the hf backend too."""
    return upstream["teacher"].out / "model"


@pytest.fixture(scope="session")
def served_data(upstream: dict[str, RunDir]) -> ShardSet:
    """64 training and 8 held-out rows of 48 tokens, of the served model's vocabulary of 320."""
    return ShardSet.open(upstream["data"].out)


@pytest.fixture(scope="session")
def chat_folder(served_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The served model with a chat template: a conversation is its messages, a line each."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(served_folder, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    return folder


@pytest.fixture(scope="session")
def vllm_settings(vllm_environment: Path, chat_folder: Path) -> ServingSettings:
    """How the model is served here: in fp32, as the hf backend computes it, no cap on log-probabilities."""
    return ServingSettings(
        folder=chat_folder,
        environment=vllm_environment,
        name="tiny",
        kv_cache_bytes=256 << 20,
        max_logprobs=-1,
        dtype="float32",
    )


@pytest.fixture(scope="session")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables of a vLLM in tests: one thread, no core of its own, a cache that is thrown away.

    It may write bytecode, whatever holds for the tests: each of its processes would compile a million lines again.
    """
    cache = str(tmp_path_factory.mktemp("vllm-cache"))
    fixed = {"VLLM_CACHE_ROOT": cache, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | fixed


@pytest.fixture(scope="session")
def vllm_server(
    vllm_settings: ServingSettings, surroundings: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VLLMServer]:
    """The server: model ``tiny``."""
    log = tmp_path_factory.mktemp("vllm-log") / "server.log"
    with VLLMServer.start(vllm_settings, log=log, env=surroundings, memory_seconds=0.0) as server:
        yield server
    assert members(server.kept.session) == []


@pytest.fixture(scope="session")
def vllm_url(vllm_server: VLLMServer) -> str:
    """``http://127.0.0.1:…/v1`` of the server."""
    return vllm_server.url


@pytest.fixture
def proxy(vllm_url: str) -> Iterator[FaultProxy]:
    """A fault proxy in front of the real server."""
    with FaultProxy(vllm_url) as found:
        yield found


def all_rows(data: ShardSet) -> list[npt.NDArray[np.int64]]:
    """Every training and held-out row."""
    return [row for shard in (data.train, data.heldout) for row in shard.rows(np.arange(len(shard)))]


def worst_difference(one: Rows, other: Rows) -> tuple[float, float]:
    """The largest difference of a log-probability, and of a rest mass.

    Rows are compared id by id. An id that one side has alone is compared with the other's smallest: at the edge of the
    top-k, rounding decides between two that are as likely.
    """
    worst = mass = 0.0
    assert one.keys() == other.keys()
    for number, mine in one.items():
        theirs = other[number]
        assert mine.ids.shape == theirs.ids.shape
        for a_ids, a, b_ids, b in zip(mine.ids, mine.logprobs, theirs.ids, theirs.logprobs, strict=True):
            left, right = (
                dict(zip(a_ids.tolist(), a.tolist(), strict=True)),
                dict(zip(b_ids.tolist(), b.tolist(), strict=True)),
            )
            for token in left.keys() | right.keys():
                difference = left.get(token, min(left.values())) - right.get(token, min(right.values()))
                worst = max(worst, abs(difference))
        rest = np.exp(mine.tails[1.0].astype(np.float64)) - np.exp(theirs.tails[1.0].astype(np.float64))
        mass = max(mass, float(np.abs(rest).max()))
    return worst, mass


@pytest.fixture(scope="session")
def hf_rows(served_folder: Path, served_data: ShardSet) -> Rows:
    """What transformers says in this process, in fp32."""
    teacher = HFTeacher.open(served_folder)
    return dict(teacher.score(all_rows(served_data), k=K, temperatures=(1.0,)))


@pytest.fixture(scope="session")
def http_rows(vllm_url: str, served_folder: Path, served_data: ShardSet) -> Rows:
    """What the server says."""
    teacher = OpenAITeacher.open(vllm_url, "tiny", served_folder)
    try:
        return dict(teacher.score(all_rows(served_data), k=K, temperatures=(1.0,)))
    finally:
        teacher.close()
