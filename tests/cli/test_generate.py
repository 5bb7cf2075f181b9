"""``latentforge generate``: prompts from wherever they are, text for people, objects for programs, clean ends."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from latentforge.cli import main
from latentforge.evidence.digests import file_sha256

from ..latent_folders import Folders

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def said(folders: Folders, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``said(*arguments, stdin=b"", kind="latent")``: exit code, standard output, standard error."""

    def run(*arguments: object, stdin: bytes | None = None, kind: str = "latent") -> tuple[int, str, str]:
        capsys.readouterr()
        piped = io.TextIOWrapper(io.BytesIO(stdin or b""))
        if stdin is None:
            monkeypatch.setattr(piped, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdin", piped)
        code = main(["generate", str(getattr(folders, kind)), "--device", "cpu", *map(str, arguments)])
        return (code, *capsys.readouterr())

    return run


def objects(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.split("\n")[:-1]]


@pytest.mark.parametrize("kind", ["latent", "token"])
def test_a_prompt_is_the_same_prompt_as_argument_in_a_pipe_and_in_a_file(said: Any, kind: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ndef main(é\r\n\n", encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def main(é", "id": 7}\n', encoding="utf-8")
    typed = said("def main(é", "--max-tokens", 12, kind=kind)
    assert typed[0] == 0
    assert typed[1].endswith("\n")
    assert len(typed[1]) > 4
    assert typed[2] == ""  # no progress where there is no terminal
    content = "def main(é\n".encode()
    assert said("--max-tokens", 12, stdin=content, kind=kind) == typed
    assert said("--max-tokens", 12, "--file", "-", stdin=content, kind=kind) == typed
    for name in ("prompts.txt", "prompts.jsonl"):
        assert said("--max-tokens", 12, "--file", tmp_path / name, kind=kind) == typed


def test_text_in_a_stream_is_the_text_and_a_seed_gives_it_again(said: Any) -> None:
    _, once, _ = said("class A", "--max-tokens", 40, "--seed", 5)
    assert said("class A", "--max-tokens", 40, "--seed", 5, "--stream")[1] == once
    assert said("class A", "--max-tokens", 40, "--seed", 6)[1] != once
    assert said("class A", "--max-tokens", 40, "--seed", 5, "--echo")[1] == "class A" + once
    code, out, _ = said("class A", "def", "--max-tokens", 40, "--seed", 5, "--stream", "--echo")
    second = said("def", "--max-tokens", 40, "--seed", 6)[1]
    assert (code, out) == (0, "class A" + once + "---\n" + "def" + second)


def test_the_share_of_all_tokens_is_not_set_as_in_the_server(said: Any) -> None:
    once = said("class A", "--max-tokens", 20, "--seed", 5)
    assert said("class A", "--max-tokens", 20, "--seed", 5, "--top-p", 1) == once
    assert said("class A", "--max-tokens", 20, "--seed", 5, "--top-p", 1, "--method", "head") == once
    assert said("class A", "--max-tokens", 20, "--seed", 5, "--top-p", 0.99) != once


def test_an_object_a_prompt_holds_what_was_written_and_how(said: Any) -> None:
    code, out, err = said("é", "def main", "", "--json", "--max-tokens", 10, "--seed", 3, "--batch", 2)
    assert (code, err) == (0, "")
    found = objects(out)
    assert [one["number"] for one in found] == [0, 1, 2]
    assert [one["prompt"] for one in found] == ["é", "def main", ""]
    for one in found:
        assert len(one["tokens"]) == len(one["logprobs"]) <= 10
        assert one["score"] == pytest.approx(sum(one["logprobs"]) / len(one["logprobs"]))
        assert one["finish"] in ("eos", "length")
        assert one["steps"] >= one["draws"] >= 1
        assert one["seconds"] > 0
    _, out, _ = said("é", "def main", "", "--json", "--max-tokens", 10, "--seed", 3, "--stream")
    parts = objects(out)
    for one in found:
        mine = [part for part in parts if part["number"] == one["number"]]
        last = mine.pop()
        assert "".join(part["text"] for part in mine) == one["text"] == last["text"]
        assert [token for part in mine for token in part["tokens"]] == one["tokens"]
        assert all("finish" not in part for part in mine)
    # Written side by side, handed on in the order of the prompts.
    assert objects(said("a", "b", "c", "--json", "--max-tokens", 5, "--batch", 1)[1])[2]["number"] == 2


@pytest.mark.parametrize(
    "how",
    [
        ("--method", "exact", "--temperature", "0.9", "--draws", "5000"),
        ("--method", "vote", "--temperature", "0", "--draws", "9"),
        ("--temperature", "0.5"),
        ("--top-k", "5", "--top-p", "0.9", "--temperature", "1.2"),
        ("--method", "greedy"),
        ("--beam", "3"),
        ("--best-of", "3"),
    ],
)
def test_each_way_of_choosing_writes(said: Any, how: tuple[str, ...]) -> None:
    code, out, err = said("def main(", "--json", "--max-tokens", 5, *how)
    assert (code, err) == (0, "")
    (found,) = objects(out)
    assert 1 <= len(found["tokens"]) <= 5
    assert (found["scores"] is None) == ("--best-of" not in how)


def test_a_text_that_fails_is_told_and_the_command_ends_with_1(said: Any) -> None:
    how = ("--method", "exact", "--temperature", "0.04", "--draws", "30", "--max-tokens", "20")
    code, text, err = said("class A", *how)
    assert (code, text.count("\n")) == (1, 1)
    assert "none of 30 draws was accepted at temperature = 0.04" in err
    assert "next: allow more than draws = 30" in err
    code, out, err = said("class A", "--json", *how)
    assert (code, err) == (1, "")
    (found,) = objects(out)
    assert found["finish"] == "failed"
    assert found["text"] == text.removesuffix("\n")  # what there was before
    assert "none of 30 draws" in found["error"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a", "--method", "nucleus"), "--method nucleus is none of head, exact, vote, tokens, greedy"),
        (("a", "--draws", "7"), "--draws 7: only exact and vote"),
        (("a", "--beam", "2", "--stream"), "--beam 2 with --stream"),
        (("a", "--best-of", "4", "--stream"), "--best-of 4 with --stream"),
        (("a", "--beam", "2", "--best-of", "4"), "--best-of 4 with --beam 2"),
        (("a", "--beam", "2", "--top-k", "4"), "--top-k 4 with --beam"),
        (("a", "--beam", "2", "--method", "vote"), "--beam 2 with --method vote"),
        (("a", "--method", "greedy", "--temperature", "0.5"), "--temperature 0.5 with --method greedy"),
        (("a", "--best-of", "2", "--method", "greedy"), "--best-of 2 with --method greedy"),
        (("a", "--echo", "--json"), "--echo with --json"),
        (("a", "--file", "b"), "--file b and 1 prompt(s) beside it"),
        (("--file", "nowhere.txt"), "--file nowhere.txt cannot be read"),
        (("a", "--top-k", "0"), "--top-k"),
        (("a", "--max-tokens", "0"), "--max-tokens"),
        (("a", "--top-p", "1.5"), "--top-p 1.5 is not above 0"),
        (("a", "--top-p", "nan"), "--top-p nan is not above 0"),
        (("a", "--temperature", "nan"), "temperature = nan"),
        (("a", "--top-k", "9", "--method", "head"), "top_k = 9: the method 'head'"),
        (("a", "--top-k", "900"), "top_k = 900 is more than the 320 tokens"),
        (("a", "--seed", str(2**64)), f"seed = {2**64}"),
        (("a", "--device", "tpu"), "device = 'tpu'"),
        (("\udcff",), r"prompt '\udcff' is not UTF-8"),
        ((), "there is no prompt"),
    ],
)
def test_what_cannot_be_is_refused_by_flag_and_value(
    said: Any, arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = said(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert "  next: " in err or "is more than" in err or "64-bit" in err


def test_a_file_of_prompts_that_cannot_be_read_is_refused_by_its_line(said: Any, tmp_path: Path) -> None:
    for name, content, words in (
        ("a.txt", b"\n \n", "a.txt holds no prompt"),
        ("b.txt", b"abc\xff", "b.txt is not UTF-8 at byte 3"),
        ("c.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "c.jsonl, line 2 is no object"),
        ("d.jsonl", b"not json\n", "d.jsonl, line 1 is no object"),
        ("e.jsonl", b'{"prompt": 5}\n', "e.jsonl, line 1 is no object"),
    ):
        (tmp_path / name).write_bytes(content)
        code, out, err = said("--file", tmp_path / name)
        assert (code, out) == (2, "")
        assert words in err
    assert "standard input is not UTF-8 at byte 0" in said(stdin=b"\xff")[2]


def test_nothing_is_written_into_the_students_folder(said: Any, folders: Folders) -> None:
    def content() -> dict[Path, str]:
        return {file: file_sha256(file) for file in sorted(folders.latent.rglob("*")) if file.is_file()}

    before = content()
    said("a", "--max-tokens", 3)
    assert content() == before


@pytest.mark.parametrize("how", [(), ("--json",), ("--stream",)])
def test_without_standard_output_it_ends_as_with_it(
    said: Any, how: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as with  >&-
    assert said("a", "--max-tokens", 3, *how)[::2] == (0, "")


def started(folders: Folders) -> subprocess.Popen[bytes]:
    """A command that would write for long, when its first text is there."""
    command = [sys.executable, "-m", "latentforge", "generate", str(folders.latent), "--file", "-", "--stream"]
    command += ["--max-tokens", "500", "--device", "cpu"]
    pipe = subprocess.PIPE
    # Whoever runs the tests may ignore Ctrl-C: a shell does so for what it starts in the background.
    noticing = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, preexec_fn=noticing)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"def main(\n" * 3000)
    process.stdin.close()
    assert process.stdout.read(3)
    return process


def ended(process: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    with process:
        assert process.stderr is not None
        said = process.stderr.read()
        return process.wait(), said


def test_a_reader_that_goes_away_ends_it_without_a_word(folders: Folders) -> None:
    process = started(folders)
    assert process.stdout is not None
    process.stdout.close()
    assert ended(process) == (141, b"")


def test_ctrl_c_ends_it_with_130_and_no_traceback(folders: Folders) -> None:
    process = started(folders)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    process.stdout.read()
    code, said = ended(process)
    assert (code, said.strip()) == (130, b"")
