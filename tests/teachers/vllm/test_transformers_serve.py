"""A real server that answers with HTTP 200 and without log-probabilities: transformers serve."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from latentforge.spec.sections import TeacherSpec
from latentforge.teachers.checking import check_served


@pytest.fixture(scope="module")
def transformers_url(
    vllm_environment: Path, served_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """``http://127.0.0.1:…/v1`` of a running transformers serve, from the environment that vLLM has."""
    folder = tmp_path_factory.mktemp("transformers-serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder), "OMP_NUM_THREADS": "1"}
    command = [str(vllm_environment / "bin" / "transformers"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "server.log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            [*command, "--device", "cpu", str(served_folder)],
            env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        _await(server, f"http://127.0.0.1:{port}/v1/models", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(30)


def _await(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=20):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail("transformers serve did not start:\n" + log.read_text(errors="replace")[-2000:])


def test_a_server_that_answers_200_without_rows_is_told_for_what_it_is(
    transformers_url: str, served_folder: Path
) -> None:
    spec = TeacherSpec(backend="openai", url=transformers_url, served_model=str(served_folder))
    report = check_served(spec, served_folder, {}, k=20, requests=1)
    (failed,) = [one for one in report.findings if one.state == "fail"]
    assert (failed.step, failed.kind, int(report.code)) == ("score", "no-logprobs", 1)
    assert "HTTP 200" in failed.said
    assert "vLLM" in str(failed.next)
    assert {one.name: one.probed for one in report.abilities} == {
        "score": False, "sample": False, "logits": False, "chat": False,
    }  # fmt: skip
