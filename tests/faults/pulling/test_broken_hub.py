"""Row 18: a hub that answers 5xx, cuts, truncates, forgets ranges, changes its mind, or sends other bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.pulling.listing import Catalogue
from dispatch.pulling.onhost.web import ATTEMPTS
from dispatch.pulling.refs import parse_ref
from latentforge.errors import RefusedError, UnknownOutcomeError
from latentforge.verdicts import ExitCode

pytestmark = pytest.mark.fault(row=18)

Make = Callable[..., Any]
REF = parse_ref("acme/tiny-lm@" + "c0ffee" * 6 + "c0de")
WEIGHTS = r"/cdn/model\.safetensors"


def nothing_counts(place: Path) -> None:
    """Neither the model's name nor its marker is there."""
    assert not (place / "files").exists()
    assert not (place / ".complete.json").exists()


@pytest.mark.parametrize("how", [{"status": 503}, {"status": 500}, {"status": 429}, {"short": 40}, {"cut": 10}])
def test_a_list_that_fails_in_its_middle_is_asked_again(hub: Any, fault: Make, how: dict[str, int]) -> None:
    whole = Catalogue(hub.url).files_of(REF)
    hub.faults.append(fault("cursor=3", times=3, **how))
    assert Catalogue(hub.url).files_of(REF) == whole


@pytest.mark.parametrize("how", [{"status": 503}, {"short": 40}, {"cut": 10}])
def test_a_list_that_keeps_failing_in_its_middle_is_an_error_never_half_a_list(
    hub: Any, fault: Make, how: dict[str, int]
) -> None:
    hub.faults.append(fault("cursor=3", times=1000, **how))
    with pytest.raises(UnknownOutcomeError, match=f"given up after {ATTEMPTS} attempts; nothing was moved") as failed:
        Catalogue(hub.url).files_of(REF)
    assert failed.value.code is ExitCode.UNKNOWN
    assert sum("/tree/" in one["path"] for one in hub.asked) == 1 + ATTEMPTS, "the waits are bounded"


def test_small_files_that_come_with_other_bytes_than_their_git_digest_are_not_believed(hub: Any, fault: Make) -> None:
    hub.faults.append(fault(r"/cdn/config\.json", content=b"{}", times=1000))
    with pytest.raises(UnknownOutcomeError, match=r"config\.json of acme/tiny-lm.*came with other bytes"):
        Catalogue(hub.url).files_of(REF)


def test_a_server_that_cannot_be_reached_is_an_error_within_bounds(hub: Any) -> None:
    with pytest.raises(UnknownOutcomeError, match="no answer"):
        Catalogue("http://127.0.0.1:1").files_of(REF)


def test_a_list_that_goes_on_at_another_server_is_refused(hub: Any) -> None:
    hub.elsewhere = "http://other.example"
    with pytest.raises(RefusedError, match=r"other\.example, another server"):
        Catalogue(hub.url).files_of(REF)


@pytest.mark.parametrize(
    "how",
    [{"status": 503}, {"status": 502}, {"cut": 100_000}, {"short": 100_000}, {"cut": 0}],
    ids=["503", "502", "cut", "truncated", "cut at once"],
)
def test_a_file_goes_on_after_what_the_hub_did_to_it(
    hub: Any, on_host: Make, fault: Make, contents: Make, pulled_files: Make, how: dict[str, int]
) -> None:
    hub.faults.append(fault(WEIGHTS, times=2, **how))
    code, place = on_host()
    assert code == 0
    assert contents(place / "files") == pulled_files(hub.files)
    if how.get("cut") or how.get("short"):
        begins = [one["headers"].get("Range") for one in hub.asked_for("model.safetensors")]
        assert begins == [None, "bytes=100000-", "bytes=200000-"], "it goes on at the byte where it was"


@pytest.mark.parametrize(
    "how",
    [{"status": 503}, {"cut": 100}, {"short": 100}, {"content": b"wrong" * 1000}, {"stall": True}],
    ids=["503", "cut", "truncated", "wrong size", "silent"],
)
def test_a_hub_that_does_not_mend_is_an_error_and_never_the_partial_path(
    hub: Any, on_host: Make, fault: Make, how: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults.append(fault(WEIGHTS, times=1000, **how))
    code, place = on_host(silence=0.1)
    assert code == 1
    told = capsys.readouterr().out
    assert "error: model.safetensors: " in told
    assert "given up after" in told
    nothing_counts(place)
    assert len(hub.asked_for("model.safetensors")) <= 3 * ATTEMPTS


def test_bytes_that_stay_wrong_are_named_with_both_digests_and_kept_from_the_model(
    hub: Any, on_host: Make, fault: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    content = hub.files["model.safetensors"]
    hub.faults.append(fault(WEIGHTS, content=content[:-1] + bytes([content[-1] ^ 1]), times=1000))
    code, place = on_host()
    assert code == 1
    assert "came 3 times with sha256 " in capsys.readouterr().out
    nothing_counts(place)
    hub.faults.clear()
    hub.asked.clear()
    assert on_host()[0] == 0
    again = {one["path"] for one in hub.asked if one["path"].startswith("/cdn/")}
    assert again == {"/cdn/model.safetensors", "/cdn/tokenizer.json"}, "what was verified before it stays"


def test_a_server_that_ignores_ranges_costs_a_second_beginning_and_nothing_else(
    hub: Any, on_host: Make, fault: Make, contents: Make, pulled_files: Make
) -> None:
    hub.faults += [fault(WEIGHTS, cut=100_000), fault(WEIGHTS, ignore_range=True)]
    code, place = on_host()
    assert code == 0
    assert contents(place / "files") == pulled_files(hub.files)


def test_a_file_whose_etag_changed_begins_anew_instead_of_being_sewn_together(
    hub: Any, on_host: Make, fault: Make, contents: Make, pulled_files: Make
) -> None:
    content = hub.files["model.safetensors"]
    other = bytes(len(content))
    hub.faults += [fault(WEIGHTS, content=other, cut=100_000, etag='"first"'), fault(WEIGHTS, etag='"second"')]
    code, place = on_host()
    assert code == 0
    assert contents(place / "files") == pulled_files(hub.files)
    first, second = hub.asked_for("model.safetensors")
    assert second["headers"]["If-Range"] == '"first"'
    assert (first["status"], second["status"]) == (200, 200)


def test_a_gated_model_is_refused_without_asking_again(
    hub: Any, on_host: Make, fault: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults.append(fault("/resolve/", status=403, times=1000))
    code, place = on_host()
    assert code == 1
    assert "the hub answers 403: the model is gated, private or absent" in capsys.readouterr().out
    assert len(hub.asked) == 1
    nothing_counts(place)


def test_what_a_server_asks_for_between_attempts_is_granted_within_bounds(
    hub: Any, on_host: Make, fault: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("dispatch.pulling.onhost.web.time.sleep", waits.append)
    hub.faults.append(fault(WEIGHTS, status=429, headers={"Retry-After": "7"}))
    hub.faults.append(fault(WEIGHTS, status=503, headers={"Retry-After": "86400"}))
    assert on_host()[0] == 0
    assert waits == [7.0, 30.0]


def test_a_server_that_ignores_ranges_and_is_cut_elsewhere_each_time_is_given_up(
    hub: Any, on_host: Make, fault: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults += [fault(WEIGHTS, cut=(70_000, 150_000, 230_000)[at % 3], ignore_range=True) for at in range(60)]
    code, place = on_host()
    assert code == 1
    assert f"given up after {ATTEMPTS} beginnings from its first byte" in capsys.readouterr().out
    nothing_counts(place)


@pytest.mark.parametrize("status", [403, 404])
def test_an_address_in_the_store_that_ran_out_is_asked_for_again_at_the_hub(
    hub: Any, on_host: Make, fault: Make, contents: Make, pulled_files: Make, status: int
) -> None:
    hub.faults.append(fault(WEIGHTS, status=status))
    code, place = on_host()
    assert code == 0
    assert contents(place / "files") == pulled_files(hub.files)


def test_what_comes_packed_against_our_asking_is_refused_by_its_name(
    hub: Any, on_host: Make, fault: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.packed = "gzip"
    code, place = on_host()
    assert code == 1
    told = capsys.readouterr().out
    assert "packs what it sends (gzip) though it was asked not to" in told
    assert "next: is there a proxy between" in told
    nothing_counts(place)
    with pytest.raises(RefusedError, match="packs what it sends"):
        Catalogue(hub.url).files_of(REF)


def test_a_disk_that_runs_full_on_the_way_is_said_at_once_and_what_came_is_kept(
    hub: Any, on_host: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dispatch.pulling.onhost.web import Hub

    def full(hub: Any, path: str, size: int, part: Path) -> None:
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(part))

    monkeypatch.setattr(Hub, "get", full)
    code, place = on_host()
    assert code == 1
    told = capsys.readouterr().out
    assert "No space left on device" in told
    assert "latentforge dispatch gc" in told
    assert "again in" not in told
    assert len(list((place / "part").iterdir())) == 1
    nothing_counts(place)
