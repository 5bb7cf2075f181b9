"""What others wrote is read whole and strictly, or refused in a sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from latentforge.spec.reading import UnreadableError, parse_json, read_regular


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'{"a":1' + b"0" * 400 + b"}", "beyond what a double holds"),
        (b'{"a":-1' + b"0" * 9000 + b"}", "beyond what a double holds"),
        (b'{"a":1e999}', "beyond what a double holds"),
        (b'{"a":NaN}', "NaN is not JSON"),
        (b'{"a":-Infinity}', "-Infinity is not JSON"),
        (b'{"a":1,"a":2}', "'a' is written twice"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b"[" * 65 + b"]" * 65, "within each other"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "within each other"),
        (b'{"a":"\\ud800"}', "surrogates"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ("{}".encode("utf-16"), "utf-8"),
        (b"\xff", "utf-8"),
        (b"", "Expecting value"),
        (b"\0" * 64, "Expecting value"),
    ],
)
def test_what_could_not_be_written_again_is_refused(text: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_json(text)


def test_numbers_are_doubles_and_whole_ones_stay_whole_below_two_to_the_53() -> None:
    assert parse_json(f"[1, -0, {2**53 - 1}, {2**53 + 1}, 1.5, 1e-999]") == [1, 0, 2**53 - 1, float(2**53), 1.5, 0.0]
    assert [type(one) for one in parse_json(f"[{1 - 2**53}, {2**53}]")] == [int, float]
    assert parse_json(f"{2**80 + 1}", whole=int) == 2**80 + 1
    assert parse_json(b"[" * 64 + b"]" * 64) is not None
    assert parse_json('"\\u001b\\ud83d\\ude00"') == "\x1b😀"


PLANTS: list[tuple[str, Callable[[Path], object]]] = [
    ("no regular file", os.mkfifo),
    ("no regular file", Path.mkdir),
    ("no regular file", lambda path: path.symlink_to("/dev/zero")),
    ("no regular file", lambda path: path.symlink_to(".")),
    ("a link to nothing", lambda path: path.symlink_to("absent")),
    ("cannot be read: Too many levels", lambda path: path.symlink_to(path.name)),
    ("has 11 bytes, and may have 10", lambda path: path.write_bytes(b"x" * 11)),
]


@pytest.mark.parametrize(("why", "plant"), PLANTS, ids=range(len(PLANTS)))
def test_what_is_no_file_of_a_bounded_size_is_refused_and_keeps_nobody_waiting(
    tmp_path: Path, why: str, plant: Callable[[Path], object]
) -> None:
    path = tmp_path / "file"
    plant(path)
    with pytest.raises(UnreadableError, match=why) as refused:
        read_regular(path, largest=10)
    assert str(refused.value) == f"{path} {refused.value.why}"


def test_a_file_is_read_whole_and_one_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10)
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", largest=10) == b"x" * 10
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "absent")
    with pytest.raises(UnreadableError, match="null byte"):
        read_regular(tmp_path / "a\0b")
