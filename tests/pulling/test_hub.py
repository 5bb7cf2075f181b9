"""What a pull brings from a hub: everything that was listed, verified, resumed, and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.agent.paths import Root
from dispatch.agent.pulling import look
from dispatch.pulling.listing import Catalogue, endpoint_of
from dispatch.pulling.refs import model_ref, parse_ref
from latentforge.errors import RefusedError
from latentforge.evidence.digests import tree_sha256

Make = Callable[..., Any]
COMMIT = "c0ffee" * 6 + "c0de"
REF = f"acme/tiny-lm@{COMMIT}"


def seen(place: Path) -> dict[str, Any]:
    """The agent's look at a model."""
    os.chmod(place.parent.parent, 0o700)
    return look(Root(str(place.parent.parent)), place.name)


def test_the_list_knows_size_and_digest_of_every_file_before_anything_is_moved(
    hub: Any, pulled_files: Make, tmp_path: Path
) -> None:
    listing = Catalogue(hub.url).files_of(parse_ref(REF))
    files = pulled_files(hub.files)
    assert {file.path: file.bytes for file in listing.files} == {name: len(data) for name, data in files.items()}
    assert (listing.left_out, listing.left_out_bytes) == (1, 800)
    for name, data in files.items():
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_bytes(data)
    assert listing.tree_sha256 == tree_sha256(tmp_path / "m"), "the digest that a run's id takes"
    pages = [one for one in hub.asked if "/tree/" in one["path"]]
    assert len(pages) == 3, "the list comes in pages"
    assert not hub.asked_for("model.safetensors")


def test_a_pull_brings_every_listed_file_and_marks_the_model_last(
    hub: Any, on_host: Make, contents: Make, pulled_files: Make
) -> None:
    code, place = on_host()
    assert code == 0
    assert contents(place / "files") == pulled_files(hub.files)
    assert seen(place)["complete"]
    assert seen(place)["sha256"] == tree_sha256(place / "files")
    assert sorted(path.name for path in place.iterdir()) == [".complete.json", "files"]


def test_a_second_pull_moves_nothing(hub: Any, on_host: Make, capsys: pytest.CaptureFixture[str]) -> None:
    on_host()
    hub.asked.clear()
    code, place = on_host()
    assert code == 0
    assert hub.asked == []
    assert "nothing moved" in capsys.readouterr().out
    assert seen(place)["complete"]


def test_a_branch_is_resolved_to_its_commit_and_an_unknown_one_is_refused(hub: Any) -> None:
    catalogue = Catalogue(hub.url)
    assert str(catalogue.pinned(parse_ref("acme/tiny-lm@main"))) == REF
    assert str(catalogue.pinned(parse_ref("acme/tiny-lm"))) == REF
    with pytest.raises(RefusedError, match="404"):
        catalogue.pinned(parse_ref("acme/tiny-lm@nowhere"))


@pytest.mark.parametrize("name", ["../up@" + COMMIT, "a--b/c@x", "a/b/c@x", "a b@x", "x@", "-a/b", "a/b@../c"])
def test_what_names_no_model_is_refused_by_its_value(name: str) -> None:
    with pytest.raises(RefusedError, match="owner/name@revision"):
        parse_ref(name)


def test_paths_and_models_are_told_apart() -> None:
    assert model_ref("/models/a@b") is None
    assert model_ref("~/x@y") is None
    assert model_ref("folder") is None
    found = model_ref(REF)
    assert found is not None
    assert found.pinned
    assert found.folder == f"acme--tiny-lm@{COMMIT}"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("ftp://hub", "is not the address"),
        ("hub.example", "is not the address"),
        ("https://me:secret@hub.example", "holds a user name or a password for hub.example"),
    ],
)
def test_an_endpoint_that_is_none_or_holds_a_secret_is_refused(value: str, told: str) -> None:
    with pytest.raises(RefusedError, match=told) as refused:
        endpoint_of({"HF_ENDPOINT": value})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("path", ["../../up.safetensors", "/abs.safetensors", "a//b.safetensors", "a\\b.safetensors"])
def test_a_list_that_leads_out_of_the_model_is_refused(hub: Any, path: str) -> None:
    hub.files[path] = b"weights"
    with pytest.raises(RefusedError, match="not a plain path"):
        Catalogue(hub.url).files_of(parse_ref(REF))


@pytest.mark.parametrize(
    ("paths", "told"),
    [
        (["a.txt", "a.txt/b.txt"], "'a.txt' as a file and as a folder"),
        (["two\nlines.txt"], "not plain text"),
        (["bell\x1b[31m.txt"], "not plain text"),
        (["half\ud800.txt"], "not plain text"),
        (["nul\0.txt"], "not plain text"),
        ([f"{'é' * 130}.txt"], "more than the 255 bytes"),
    ],
)
def test_a_list_that_no_folder_can_hold_is_refused_before_anything_moves(
    hub: Any, monkeypatch: pytest.MonkeyPatch, paths: list[str], told: str
) -> None:
    rows = [{"type": "file", "path": p, "size": 1, "oid": "0", "lfs": {"oid": "0" * 64, "size": 1}} for p in paths]
    monkeypatch.setattr(hub, "rows", lambda: [*rows, {**rows[0], "path": "w.safetensors"}])
    with pytest.raises(RefusedError, match=told):
        Catalogue(hub.url).files_of(parse_ref(REF))


def test_two_names_that_are_one_file_where_case_does_not_count_make_no_model(
    hub: Any, on_host: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dispatch.pulling.onhost import pull as program

    pair = ("README.md", "readme.md")

    def put(verified: Path, tree: Path, file: Any) -> None:
        in_place(verified, tree, file)
        for other in set(pair) - {file.path} if file.path in pair else ():
            (tree / other).unlink(missing_ok=True)
            (tree / other).hardlink_to(tree / file.path)

    in_place = program.put_in_place
    hub.files["readme.md"] = b"in small letters"
    monkeypatch.setattr(program, "put_in_place", put)
    listing = Catalogue(hub.url).files_of(parse_ref(REF))
    code, place = on_host(listing=listing)
    assert code == 1
    assert "README.md and readme.md are one file on the file system" in capsys.readouterr().out
    assert not (place / ".complete.json").exists()


@pytest.mark.parametrize(
    ("status", "token", "told", "remedy"),
    [
        (401, None, "401.*gated, private or absent, and there is no token here", "HF_TOKEN set"),
        (403, "hf_x", r"403 \(GatedRepo\).*its token was not accepted", "accept its terms"),
        (404, None, "answers 404 .*for /api/models/acme/tiny-lm/tree", "look whether the model and its revision"),
    ],
)
def test_what_the_hub_refuses_ends_with_what_to_do_about_it(
    hub: Any, fault: Make, monkeypatch: pytest.MonkeyPatch, status: int, token: str | None, told: str, remedy: str
) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.faults.append(fault("/tree/", status=status, headers={"X-Error-Code": "GatedRepo"} if status == 403 else {}))
    with pytest.raises(RefusedError, match=told) as refused:
        Catalogue(hub.url).files_of(parse_ref(REF))
    assert remedy in str(refused.value.next)
    assert f"{hub.url}/acme/tiny-lm" in str(refused.value.next)
    assert len(hub.asked) == 1, "it does not pass by itself"


def test_a_model_without_safetensors_is_refused_before_anything_moves(hub: Any) -> None:
    del hub.files["model.safetensors"]
    with pytest.raises(RefusedError, match=r"no \.safetensors file"):
        Catalogue(hub.url).files_of(parse_ref(REF))


def test_the_token_goes_to_the_hub_alone_and_into_no_log(
    hub: Any, on_host: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.token = "hf_canary_31337"
    code, _place = on_host(token="HF_TOKEN")
    told = capsys.readouterr().out
    assert code == 1
    assert "there is no token here (HF_TOKEN" in told
    monkeypatch.setenv("HF_TOKEN", hub.token)
    code, place = on_host(token="HF_TOKEN")
    assert code == 0
    at_store = [one["headers"] for one in hub.asked if one["path"].startswith("/cdn/")]
    assert at_store
    assert not any("Authorization" in headers for headers in at_store), "a redirect took the token to another server"
    written = b"".join(path.read_bytes() for path in place.parent.rglob("*") if path.is_file())
    assert b"canary" not in written + (told + capsys.readouterr().out).encode()


def test_the_token_of_the_hubs_own_client_is_found(
    hub: Any, on_host: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_from_a_file"
    (tmp_path / "token").write_text("hf_from_a_file\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    assert on_host(token="HF_TOKEN")[0] == 0


def test_a_disk_that_would_be_filled_is_refused_before_the_first_byte(
    hub: Any, on_host: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    code, place = on_host(margin=1 << 60)
    assert code == 1
    assert "must stay free" in capsys.readouterr().out
    assert hub.asked == []
    assert not (place / "files").exists()


def test_a_lost_marker_costs_no_second_transfer(hub: Any, on_host: Make) -> None:
    _, place = on_host()
    (place / ".complete.json").unlink()
    assert not seen(place)["complete"]
    hub.asked.clear()
    assert on_host()[0] == 0
    assert hub.asked == []
    assert json.loads((place / ".complete.json").read_bytes())["model"] == REF
