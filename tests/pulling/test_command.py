"""`latentforge dispatch pull` through every layer: a run under the real agent, a typed result, and no half-model."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.hosts.inventory import Host
from dispatch.pulling.command import Wanted, pull_here
from latentforge.errors import FailedError, UnknownOutcomeError
from latentforge.evidence.digests import tree_sha256
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]
COMMIT = "c0ffee" * 6 + "c0de"
REF = f"acme/tiny-lm@{COMMIT}"
LOCAL = Host(name="local")


def pull(laptop: Any, source: str = REF, name: str | None = None, host: Host = LOCAL, **more: Any) -> ExitCode:
    options = {"dry_run": False, "as_json": False, **more}
    return pull_here(host, Wanted.of(source, name), laptop.places, os.environ, **options)


def models(laptop: Any) -> Path:
    return laptop.home / "state" / "latentforge" / "models"


def test_a_dry_run_tells_files_bytes_and_commit_and_changes_nothing(
    hub: Any, laptop: Any, capsys: pytest.CaptureFixture[str], snapshot: Make
) -> None:
    before = snapshot(laptop.home)
    assert pull(laptop, "acme/tiny-lm@main", dry_run=True) is ExitCode.PASS
    told = capsys.readouterr().out
    assert f"acme/tiny-lm@main is commit {COMMIT} now; in a pipeline:  {REF}" in told
    assert "5 files, 311.1 kB" in told
    assert "left out: 1 files, 800 B, of other formats" in told
    assert "run     it is not there, 311.1 kB to move" in told
    assert snapshot(laptop.home) == before
    assert not hub.asked_for("model.safetensors")


def test_a_pull_is_a_run_and_ends_with_the_models_path_digest_and_size(
    hub: Any, laptop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """D3: the resolver gives a typed artefact; nothing is scraped from prose, no exit code is ignored."""
    assert pull(laptop, as_json=True) is ExitCode.PASS
    done = json.loads(capsys.readouterr().out)
    folder = models(laptop) / f"acme--tiny-lm@{COMMIT}" / "files"
    assert done["path"] == str(folder)
    assert done["sha256"] == tree_sha256(folder)
    assert (done["files"], done["complete"], done["will"]) == (5, True, "run")
    assert done["moved"] == done["bytes"] == 311_139
    assert done["run"].startswith("pull-")
    run = models(laptop).parent / "runs" / done["run"]
    assert (run / "exit.rec").is_file()
    assert "step 1/5 README.md" in (run / "launch.log").read_text()
    assert json.loads((run / "out" / "pulled.json").read_bytes())["moved"] == done["moved"]
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == 0o400


def test_the_laptops_token_reaches_the_hub_and_lies_nowhere(
    hub: Any, laptop: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.token = "hf_Zq90210x"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert pull(laptop) is ExitCode.PASS
    told = capsys.readouterr()
    written = b"".join(path.read_bytes() for path in laptop.home.rglob("*") if path.is_file())
    assert b"Zq90210x" not in written + (told.out + told.err).encode()
    names = [json.loads(path.read_bytes())["secrets"] for path in laptop.home.rglob("launch.json")]
    assert names == [["HF_TOKEN"]]


def test_a_second_pull_asks_nobody_but_the_host_and_moves_nothing(
    hub: Any, laptop: Any, capsys: pytest.CaptureFixture[str], snapshot: Make
) -> None:
    pull(laptop)
    hub.asked.clear()
    capsys.readouterr()
    before = snapshot(laptop.home)
    assert pull(laptop) is ExitCode.PASS
    assert "no changes: nothing moved" in capsys.readouterr().out
    assert hub.asked == []
    assert snapshot(laptop.home) == before


def test_a_pull_that_fails_says_so_with_its_exit_code_and_the_next_goes_on(
    hub: Any, laptop: Any, fault: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults.append(fault(r"/cdn/model\.safetensors", cut=50, times=1000))
    with pytest.raises(FailedError, match=r"the pull pull-[0-9a-f]{20} of acme/tiny-lm@.* did not succeed") as failed:
        pull(laptop)
    assert failed.value.code is ExitCode.FAIL
    assert failed.value.next is not None
    assert f"latentforge dispatch pull {REF}" in failed.value.next
    place = models(laptop) / f"acme--tiny-lm@{COMMIT}"
    assert not (place / "files").exists()
    assert not (place / ".complete.json").exists()
    hub.faults.clear()
    assert pull(laptop) is ExitCode.PASS
    assert "attempt 2, after one that fail" in capsys.readouterr().out


def test_a_hub_that_fails_while_it_is_asked_for_the_list_starts_no_run(hub: Any, laptop: Any, fault: Make) -> None:
    hub.faults.append(fault("/tree/", status=503, times=1000))
    with pytest.raises(UnknownOutcomeError, match="nothing was moved"):
        pull(laptop)
    assert not models(laptop).exists()


def test_a_disk_too_small_for_the_rest_is_refused_on_the_laptop(
    hub: Any, laptop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dispatch.pulling.pull.MARGIN", 1 << 60)
    with pytest.raises(FailedError, match="must stay free") as failed:
        pull(laptop)
    assert failed.value.next is not None
    assert "dispatch gc" in failed.value.next
    assert not models(laptop).exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["./weights"], "needs a name"),
        ([REF, "--name", "x"], "is for folders"),
        (["not a model"], "neither owner/name@revision of a hub nor a folder"),
        (["./nowhere", "--name", "x"], "nowhere does not exist"),
        ([REF, "--host", "gx10"], "host 'gx10' is not enrolled"),
        ([REF, "--each", "local", "--detach"], "--detach and --each"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_value(laptop: Any, words: list[str], told: str) -> None:
    done = laptop.cli("pull", *words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr


def test_the_command_pulls_for_people_and_on_each_host(hub: Any, laptop: Any) -> None:
    env = {"HF_ENDPOINT": hub.url, "no_proxy": "127.0.0.1,localhost"}
    done = laptop.cli("pull", REF, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "311.1 kB moved" in done.stdout
    again = laptop.cli("pull", REF, "--each", "local", "--json", **env)
    assert again.returncode == 0, again.stdout + again.stderr
    told = json.loads(again.stdout)
    assert told["hosts"]["local"]["value"]["complete"]
    assert told["hosts"]["local"]["value"]["will"] == "keep"


def test_the_branch_of_a_model_is_printed_as_its_commit_and_a_folder_as_its_content(
    hub: Any, laptop: Any, model: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = laptop.cwd / "weights"
    for name, content in model().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert pull(laptop, "./weights", "mine", as_json=True) is ExitCode.PASS
    told = capsys.readouterr()
    done = json.loads(told.out)
    assert done["sha256"] == tree_sha256(folder), "every file of a folder is taken, whatever its format"
    assert f"weights is mine@{done['sha256'][:40]}; in a pipeline:  mine@{done['sha256'][:40]}" in told.err
    assert done["path"] == str(models(laptop) / f"mine@{done['sha256'][:40]}" / "files")
    assert tree_sha256(Path(done["path"])) == done["sha256"]
    program_and_list = 2
    assert len(list((models(laptop).parent / "cas").iterdir())) == program_and_list, "the pieces are gone again"
    assert pull(laptop, "./weights", "mine") is ExitCode.PASS
    assert "no changes: nothing moved" in capsys.readouterr().out
