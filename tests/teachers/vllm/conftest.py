"""A real vLLM: one server for all tests of this folder, in an environment of its own, serving a model trained here.

The environment is `.venv-vllm` beside the project (`make test` makes it), or what LATENTFORGE_VLLM_ENVIRONMENT names.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from latentforge.data import ShardSet
from latentforge.spec.run import RunDir
from latentforge.train.inprocess import execute_pipeline
from latentforge.train.rehearsal import tiny_spec

from ..proxy import FaultProxy

_ROOT = Path(__file__).parents[3]
_SECONDS_TO_START = 600.0
_SECONDS_A_TEST = 900
LENGTH = 48


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whichever test comes first waits for the server, for minutes where the machine is busy."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(_SECONDS_A_TEST))


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
def vllm_url(vllm_environment: Path, served_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``http://127.0.0.1:…/v1`` of a running vLLM: model ``tiny``, no cap on log-probabilities."""
    cache = tmp_path_factory.mktemp("vllm-cache")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    command = [str(vllm_environment / "bin/python"), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(served_folder), "--served-model-name", "tiny", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-logprobs", "-1"]
    command += ["--max-model-len", str(LENGTH), "--kv-cache-memory-bytes", str(256 << 20)]
    log = cache / "server.log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}/v1"
        _await_answer(server, url, log)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait(30)


def _await_answer(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    body = json.dumps({"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 1, "prompt_logprobs": 2}).encode()
    deadline = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < deadline and server.poll() is None:
        request = urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                if len(json.load(answer)["choices"][0]["prompt_logprobs"]) == 3:
                    return
        except OSError:
            time.sleep(0.25)
    pytest.fail("vLLM did not start:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-25:]))


@pytest.fixture
def proxy(vllm_url: str) -> Iterator[FaultProxy]:
    """A fault proxy in front of the real server."""
    with FaultProxy(vllm_url) as found:
        yield found
