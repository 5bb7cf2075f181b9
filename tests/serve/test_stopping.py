"""From the start to the stop of a real server: what it refuses to begin with, and that a stop finishes its work."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest

from latentforge.cli import main
from latentforge.errors import RefusedError
from latentforge.serve.limits import Limits
from latentforge.serve.running import Place, read_key

from ..latent_folders import Folders
from .conftest import KEY, running


def test_a_stop_finishes_what_is_under_way_and_takes_nothing_new(folders: Folders, tmp_path: Path) -> None:
    """Of 32 texts: one by itself may be over before the signal arrives, where the machine is busy."""
    log = tmp_path / "errors.txt"
    options = ("--name", "tiny", "--grace", "300", "--deadline", "600")
    with running(folders.latent, *options, log=log) as server:
        server.process.send_signal(signal.SIGHUP)  # ignored, since it was when the server was started
        body = {"model": "tiny", "prompt": "def", "max_tokens": 600, "seed": 1, "n": 32, "stream": True}
        with httpx2.stream("POST", server.url + "/v1/completions", json=body, timeout=300) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line.removeprefix("data: ") for line in (first, *lines) if line]
        assert rest.pop() == "[DONE]"
        ends = [choice["finish_reason"] for line in rest for choice in json.loads(line)["choices"]]
        assert len([end for end in ends if end is not None]) == 32
        assert {None, *ends} <= {None, "length", "stop"}
        assert server.wait() == 0
    assert [one["event"] for one in server.said] == ["listening", "ready", "stopping", "stopped"]
    assert server.said[2]["texts"] >= 1
    assert server.said[3]["cut"] == 0
    assert log.read_text() == ""


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_what_is_not_over_within_the_grace_time_is_cut_off_and_told(
    folders: Folders, tmp_path: Path, again: bool
) -> None:
    """By a short grace time, or by a second Ctrl-C within a long one."""
    grace = "3600" if again else "0.05"
    options = ("--grace", grace, "--max-tokens", "1000000", "--deadline", "3600")
    with running(folders.latent, *options, log=tmp_path / "errors.txt") as server:
        asked = {"prompt": "def", "max_new_tokens": 1_000_000, "method": "vote", "draws": 500, "temperature": 1}
        answers: list[Any] = []

        def ask() -> None:
            try:
                answers.append(server.post("/generate", asked))
            except httpx2.HTTPError as error:
                answers.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        with httpx2.Client(base_url=server.url, timeout=120) as client:
            while "latentforge_batch_size 1.0" not in client.get("/metrics").text:
                pass
        server.process.send_signal(signal.SIGINT)
        if again:
            assert server.process.stdout is not None
            server.said.append(json.loads(server.process.stdout.readline()))
            server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0
        asking.join()
    assert server.said[-1]["event"] == "stopped"
    assert server.said[-1]["cut"] >= 1
    if not again:
        assert answers[0].status_code == 503
        assert answers[0].json()["error"]["code"] == "stopping"
    assert "Traceback" not in (tmp_path / "errors.txt").read_text()


def test_a_folder_that_is_not_what_it_says_is_refused_before_anything_is_served(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "run"
    shutil.copytree(folders.latent, broken)
    weights = broken / "out" / "student" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(bytes(changed))
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    assert main(["serve", str(broken), "--port", "0", "--json"]) == 2
    said = capsys.readouterr()
    assert re.search(r"model\.safetensors is sha256 .* says", said.err)
    assert "ready" not in said.out
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert main(["serve", str(tmp_path / "none")]) == 2
    assert "none does not exist" in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused() -> None:
    with Place("127.0.0.1", 0, None, ()).bind() as taken, pytest.raises(RefusedError, match="in use") as error:
        Place("127.0.0.1", taken.getsockname()[1], None, ()).bind()
    assert error.value.next == "--port 0"


@pytest.mark.parametrize("host", ["a..b", "x" * 70])
def test_a_host_that_is_no_name_is_refused(host: str) -> None:
    with pytest.raises(RefusedError, match=f"--host {host}: "):
        Place(host, 0, None, ()).bind()


def test_other_machines_are_served_with_a_key_alone() -> None:
    with pytest.raises(RefusedError, match=r"--host 0\.0\.0\.0: without a key"):
        Place("0.0.0.0", 0, None, ()).bind()
    assert Place("127.0.0.1", 0, None, ()).hosts is not None
    Place("0.0.0.0", 0, KEY, ()).bind().close()


@pytest.mark.parametrize(
    "origin", ["*", "null", "example.org", "https://", "https://example.org/", "https://a https://b"]
)
def test_an_origin_is_one_of_a_web_page(origin: str) -> None:
    with pytest.raises(RefusedError, match=re.escape(repr(origin))):
        Place("127.0.0.1", 0, None, (origin,))


def test_the_key_is_in_the_environment_or_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    assert read_key(None, None, {}) is None
    assert read_key("NAME", None, {"NAME": KEY}) == read_key(None, file, {}) == KEY
    with pytest.raises(RefusedError, match="two keys"):
        read_key("NAME", file, {"NAME": KEY})
    for wrong in ("", " ", "a b", "é"):
        file.write_text(wrong)
        for variable, path in (("NAME", None), (None, file)):
            with pytest.raises(RefusedError, match="holds no key"):
                read_key(variable, path, {"NAME": wrong})
    with pytest.raises(RefusedError, match="cannot be read"):
        read_key(None, tmp_path / "none", {})


def test_limits_are_above_nothing() -> None:
    with pytest.raises(RefusedError, match="--max-batch 0 is not above 0"):
        Limits(max_batch=0)
    with pytest.raises(RefusedError, match="--deadline nan is not above 0"):
        Limits(deadline=float("nan"))
    assert Limits(max_tokens=10**400).max_tokens == 10**400
