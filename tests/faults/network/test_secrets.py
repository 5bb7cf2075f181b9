"""A secret reaches the job that was promised it, and is found nowhere else, at no moment."""

from __future__ import annotations

import hashlib
import json
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dispatch.planning.secrets import check_names, values
from dispatch.session import preview
from latentforge.errors import LatentForgeError, RefusedError
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]


# In a process of its own, so that it looks as often as it can; the word comes on stdin, and so is in no command itself.
_SAMPLER = """
import json, os, select, sys, time
word, found, looks = sys.stdin.readline().strip().encode(), set(), 0
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0.001)[0]:
    looks += 1
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    command = file.read()
            except OSError:
                continue
            if word in command:
                found.add(command.decode("utf-8", "replace"))
print(json.dumps([looks, sorted(found)]))
"""


@dataclass
class Samples:
    """How often every command line of this machine was looked at, and which of them held the word."""

    looks: int = 0
    found: list[str] = field(default_factory=list)


@contextmanager
def sampling(word: str) -> Iterator[Samples]:
    """Sample the process list meanwhile; what was seen is told at the end."""
    sampler = subprocess.Popen(
        [sys.executable, "-I", "-c", _SAMPLER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert sampler.stdin is not None
    assert sampler.stdout is not None
    sampler.stdin.write(word + "\n")
    sampler.stdin.flush()
    assert sampler.stdout.readline() == "ready\n"
    seen = Samples()
    try:
        yield seen
    finally:
        seen.looks, seen.found = json.loads(sampler.communicate()[0])


def holding(word: str, *folders: Path) -> list[str]:
    """The files below some folders that hold a word, under whatever name."""
    found = []
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and word.encode() in path.read_bytes():
                found.append(str(path))
    return found


def _listed(folder: Path) -> list[Path]:
    """What a folder holds; nothing where it is none, or is gone."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


@pytest.mark.sshd
@pytest.mark.fault(row=30)
def test_a_secret_reaches_the_jobs_and_is_found_nowhere_else(
    sshd_here: Make,
    trusted: Make,
    ask: Make,
    built: Make,
    jobs: Any,
    session: Make,
    laptop: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    canary = "canary-" + secrets.token_hex(16)
    monkeypatch.setenv("LF_TEST_TOKEN", canary)
    server = sshd_here(options="LogLevel DEBUG1")
    host = trusted(server)
    request = ask(host, 'secrets=["LF_TEST_TOKEN"]', env={"LF_TEST_TOKEN": canary})
    built(host, request)
    jobs.how |= {"digest_of": ["LF_TEST_TOKEN"]}
    looked: list[str] = []
    files: list[tuple[str, int]] = []

    def watch_files() -> None:
        while not looked:
            # What is made there is renamed and removed meanwhile: a folder can go between being named and being listed.
            for folder in _listed(tmp_path / "remote/runs"):
                for path in _listed(folder):
                    with suppress(OSError):
                        if canary.encode() in path.read_bytes():
                            files.append((path.name, path.stat().st_mode & 0o777))
            time.sleep(0.005)

    watcher = threading.Thread(target=watch_files)
    watcher.start()
    with sampling(canary) as sampler:
        assert preview(request, laptop.places, as_json=True) is ExitCode.PASS
        assert session(host).go(request) is ExitCode.PASS
        run = next(one for one in jobs.starts() if one.startswith("distill-"))
    looked.append("over")
    watcher.join(10)
    print(f"{sampler.looks} looks at the process list")
    assert sampler.looks > 20
    assert sampler.found == []
    # It was given: the job saw it, by the same bytes.
    given = (laptop.places.run(run) / "out/LF_TEST_TOKEN.sha256").read_text()
    assert given == hashlib.sha256(canary.encode()).hexdigest()
    manifest = json.loads((laptop.places.run(run) / "manifest.json").read_text())
    assert "LF_TEST_TOKEN" in json.dumps(manifest), "its name is part of what the run means"
    # And nowhere else: no file of laptop, host or server, nothing that was shown.
    assert holding(canary, tmp_path, server.folder) == []
    assert canary not in "".join(capsys.readouterr())
    # While runs waited, in one file for its owner alone.
    assert files
    assert all("secrets.env.json" in name and mode == 0o600 for name, mode in files), set(files)
    assert list((tmp_path / "remote/runs").glob("*/secrets.env.json")) == []


def test_the_search_finds_a_secret_that_is_there(tmp_path: Path) -> None:
    canary = "canary-" + secrets.token_hex(16)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/.hidden").write_text(f"x={canary}\n")
    assert holding(canary, tmp_path) == [str(tmp_path / "deep/.hidden")]
    with sampling(canary) as sampler:
        subprocess.run(["sh", "-c", "sleep 0.3; :", canary], check=True)
    assert len(sampler.found) >= 1
    (tmp_path / "deep/.hidden").unlink()


def test_a_secret_that_is_missing_or_cannot_be_one_is_refused_before_anything_is_sent(
    ask: Make, session: Make, laptop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LF_TEST_TOKEN", raising=False)
    with pytest.raises(LatentForgeError, match="'LF_TEST_TOKEN', which is not set") as refused:
        session().go(ask(None, 'secrets=["LF_TEST_TOKEN"]', env={}))
    assert refused.value.code is ExitCode.REFUSED
    assert not (laptop.home / "state/latentforge/runs").exists()
    with pytest.raises(RefusedError, match="does not say that it is a secret"):
        check_names(["PATH"])
    for wrong in ("short", "x" * 70_000, "with\0nul-in-it"):
        with pytest.raises(RefusedError, match="LF_TEST_TOKEN") as refused_value:
            values(["LF_TEST_TOKEN"], {"LF_TEST_TOKEN": wrong})
        assert wrong not in str(refused_value.value)


def test_the_agent_takes_no_secrets_but_those_that_the_launch_names_and_says_no_value(host: Any) -> None:
    canary = "canary-" + secrets.token_hex(16)
    wrongs: list[tuple[list[str], dict[str, Any]]] = [
        (["A_TOKEN"], {}),
        ([], {"A_TOKEN": canary}),
        (["A_TOKEN"], {"A_TOKEN": canary + "\0"}),
        (["A=B"], {"A=B": canary}),
        (["LF_TEST_MARK"], {"LF_TEST_MARK": canary}),
    ]
    for names, given in wrongs:
        with pytest.raises(Exception, match="secret") as refused:
            host.python("pass", secrets=names, given=given)
        assert canary not in str(refused.value)
    seen = host.python(
        "import os, resource as r; assert os.environ['A_TOKEN'] and r.getrlimit(r.RLIMIT_CORE)[0] == 1",
        secrets=["A_TOKEN"],
        given={"A_TOKEN": canary},
    )
    assert (host.paths(seen).secrets.stat().st_mode & 0o777) == 0o600
    host.call("launch", chain=[seen])
    assert host.wait(seen, "finished")["outcome"] == "pass"
    assert not host.paths(seen).secrets.exists()
    assert holding(canary, host.dir) == []
    # A run whose secrets are gone is not started without them.
    lacking = host.python("pass", secrets=["A_TOKEN"], given={"A_TOKEN": canary})
    host.paths(lacking).secrets.unlink()
    host.call("launch", chain=[lacking])
    assert "its secrets are gone" in host.wait(lacking, "finished")["reason"]


@pytest.mark.parametrize("broken", ["launch", "program", "writer"])
def test_no_secret_is_left_by_a_run_that_could_not_be_started_or_by_a_writer_that_was_killed(
    host: Any, broken: str
) -> None:
    canary = "canary-" + secrets.token_hex(16)
    argv = ["/nowhere/at-all"] if broken == "program" else [sys.executable, "-I", "-c", "pass"]
    run = host.reserve(argv, secrets=["A_TOKEN"], given={"A_TOKEN": canary})
    paths = host.paths(run)
    if broken == "launch":
        paths.launch.write_text("{")
    if broken == "writer":
        (paths.dir / f".tmp-{paths.secrets.name}-1-00000000").write_text(canary)
    assert holding(canary, host.dir)
    host.call("launch", chain=[run])
    assert host.wait(run, "finished")["outcome"] == ("pass" if broken == "writer" else "crashed")
    assert holding(canary, host.dir) == []
