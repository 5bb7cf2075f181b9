"""Whatever lies in the place of evidence: the right exit code and a sentence, never a traceback, a hang or a pass."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentforge.cli import main
from latentforge.errors import LatentForgeError
from latentforge.evidence.checks import recorded_run
from latentforge.evidence.difference import compare_runs
from latentforge.evidence.ledger import LEDGER, Entry, read_chain
from latentforge.evidence.reading import read_run
from latentforge.evidence.verify import verify_evidence
from latentforge.spec.canonical import canonical_bytes
from latentforge.spec.reading import parse_json
from latentforge.verdicts import Outcome

CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "object": b"{}",
    "huge number": b'{"code":1' + b"0" * 400 + b"}\n",
    "infinite": b'{"code":1e999}\n',
    "not a number": b'{"code":NaN}\n',
    "a million lists": b"[" * 1_000_000 + b"\n",
    "nested, whole": b'{"a":' * 900 + b"1" + b"}" * 900 + b"\n",
    "twice": b'{"code":0,"code":1}\n',
    "marked as UTF-8": b"\xef\xbb\xbf{}",
    "no UTF-8": b"\xff\xfe\0",
    "half a character": b'{"code":"\\ud800"}\n',
    "another line end": b"{}\r\n",
}
KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("/nowhere"),
    "device": lambda path: path.symlink_to("/dev/zero"),
}
FILES = ("manifest.json", "identity.json", "launch.json", "effective.json", "exit.json", "events.jsonl", "launch.log")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recorded run, and another to compare it with."""
    runs = tmp_path_factory.mktemp("whole")
    run_dir = recorded_run(runs)
    (run_dir / "manifest.json").chmod(0o644)
    return run_dir, recorded_run(runs / "other", seed=8)


def replaced(path: Path, plant: Callable[[Path], object]) -> Iterator[Path]:
    """Something else under the name of a file, which is put back afterwards."""
    kept = path.with_name(f"{path.name}.kept")
    aside = path.parents[1] / kept.name if path.name != LEDGER else kept
    path.rename(aside)
    try:
        plant(path)
        yield path
    finally:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        aside.rename(path)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["evidence", *words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize("what", [*CONTENTS, *KINDS])
def test_anything_else_in_the_place_of_a_file_fails_in_a_sentence(
    whole: tuple[Path, Path], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, other = whole
    plant = KINDS.get(what) or (lambda path: path.write_bytes(CONTENTS[what]))
    for name in (*FILES, LEDGER):
        path = run_dir.parent / LEDGER if name == LEDGER else run_dir / name
        for _ in replaced(path, plant):
            code, text = said(capsys, "verify", str(run_dir))
            assert (name, code) == (name, 1)
            assert "FAILED " in text
            code, text = said(capsys, "verify", str(run_dir.parent), "--json")
            assert (name, code) == (name, 1)
            assert json.loads(text)["outcome"] == "fail"
            code, text = said(capsys, "diff", str(run_dir), str(other))
            assert code in (0, 1, 2), (name, text)
            assert "unexpected" not in text


def reforged(run_dir: Path, statement: dict[str, Any]) -> None:
    """The statement over the files as they are, and the ledger chained for it: every digest is right."""
    digests = {one["name"]: hashlib.sha256((run_dir / one["name"]).read_bytes()) for one in statement["subject"]}
    subjects = [{"name": name, "digest": {"sha256": one.hexdigest()}} for name, one in digests.items()]
    content = canonical_bytes({**statement, "subject": subjects})
    (run_dir / "manifest.json").write_bytes(content)
    ledger = run_dir.parent / LEDGER
    *before, last = read_chain(ledger).entries
    entry = Entry(last.entry, last.prev, last.run, hashlib.sha256(content).hexdigest(), last.wall)
    ledger.write_bytes(b"".join(one.line for one in (*before, entry)))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**60) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value each value stands."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, one in inner:
        yield from places(one, (*at, name))


def put(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A JSON value with another one at a place."""
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = put(value[at[0]], at[1:], new)
    return copy


FREE = ("plan", "host", "dispatched")
"""What no file of the run says: the control plane's word."""


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), new=VALUES)
def test_no_value_of_a_statement_can_be_another_though_every_digest_is_made_right(
    whole: tuple[Path, Path], data: st.DataObject, new: Any
) -> None:
    run_dir, _ = whole
    content, ledger = (run_dir / "manifest.json").read_bytes(), (run_dir.parent / LEDGER).read_bytes()
    statement = parse_json(content)
    spots = [at for at in places(statement["predicate"]) if at and at[0] not in FREE]
    at = data.draw(st.sampled_from(spots))
    changed = put(statement, ("predicate", *at), new)
    try:
        if canonical_bytes(changed) == content:
            return
        reforged(run_dir, changed)
        assert verify_evidence(run_dir).outcome is Outcome.FAIL
    except LatentForgeError:  # what cannot be written in canonical form cannot be planted
        assert (run_dir / "manifest.json").read_bytes() == content
    finally:
        (run_dir / "manifest.json").write_bytes(content)
        (run_dir.parent / LEDGER).write_bytes(ledger)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), new=VALUES)
def test_no_value_of_a_file_that_is_of_another_kind_ends_in_a_traceback(
    whole: tuple[Path, Path], data: st.DataObject, new: Any
) -> None:
    run_dir, other = whole
    name = data.draw(st.sampled_from(["effective.json", "exit.json", "launch.json", "events.jsonl"]))
    kept = {path: path.read_bytes() for path in (run_dir / name, run_dir / "manifest.json", run_dir.parent / LEDGER)}
    lines = kept[run_dir / name].splitlines() if name == "events.jsonl" else [kept[run_dir / name]]
    number = data.draw(st.integers(0, len(lines) - 1))
    value = json.loads(lines[number])
    at = data.draw(st.sampled_from(list(places(value))))
    lines[number] = json.dumps(put(value, at, new)).encode()
    try:
        (run_dir / name).write_bytes(b"\n".join([*lines, b""]) if name == "events.jsonl" else lines[0])
        reforged(run_dir, parse_json(kept[run_dir / "manifest.json"]))
        assert verify_evidence(run_dir).outcome in (Outcome.PASS, Outcome.FAIL)
        with suppress(LatentForgeError):
            compare_runs(read_run(run_dir), read_run(other))
    finally:
        for path, content in kept.items():
            path.write_bytes(content)


def test_an_event_that_ends_with_false_ended_with_no_exit_code(tmp_path: Path) -> None:
    run_dir = recorded_run(tmp_path)
    events = run_dir / "events.jsonl"
    events.write_text(events.read_text().replace('"code": 0', '"code": false'))
    assert read_run(run_dir).end == {**read_run(run_dir).end, "code": None, "outcome": "unknown"}


def test_a_name_that_is_no_text_or_steers_a_terminal_is_written_out(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "\x1b[2J").write_text("")
    code, text = said(capsys, "verify", str(run_dir))
    assert (code, "\x1b" in text, "⟨U+001B⟩[2J  appeared since" in text) == (1, False, True)
    Path(os.fsdecode(os.fsencode(run_dir) + b"/\xff")).write_text("")
    for words in (["verify", str(run_dir)], ["verify", "--json", str(run_dir)], ["diff", str(run_dir), str(run_dir)]):
        code, text = said(capsys, *words)
        assert code in (1, 2)
        assert text.encode()


@pytest.mark.parametrize("name", ["", "x" * 300, "a\0b", "/absent/x", "\udcff", "distill-", "runs/\x1b[2J"])
def test_a_name_under_which_no_run_lies_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    for words in (
        ["verify", name],
        ["diff", name, name],
        ["sign", name, "--key", name],
        ["verify", ".", "--head", name],
    ):
        code, text = said(capsys, *words)
        assert (code, "\x1b" in text) == (2, False), text
        assert text.startswith("error: ")


def test_a_file_that_may_not_be_read_is_not_known_rather_than_failed(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def denied(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).endswith(blocked):
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", denied)
    for blocked in ("manifest.json", LEDGER, "launch.log"):
        result = verify_evidence(run_dir)
        assert result.outcome is Outcome.UNKNOWN
        first = result.problems[0]
        assert (first.what, first.text) == (blocked, "cannot be read: Permission denied")
